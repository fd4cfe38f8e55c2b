"""The rdma fabric, against a fake of `mooncake.engine` that records every call and refuses what the real one refuses.

No RDMA NIC was at hand when this was written, so these tests check the calls to Mooncake.
"""

import ctypes
import importlib.metadata
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import tensorfork
from tensorfork import Copy, Region, RemoteRegion, Site, TransferFailed, TransportUnavailable
from tensorfork.testing import TransportSuite
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.transfer_engine import TransferEngine, engine, fabrics, library

SOON = 30.0


class FakeMooncake:
    """`mooncake.engine.TransferEngine`, within one process: a read copies its bytes when its status is asked for."""

    made: ClassVar[dict[int, "FakeMooncake"]] = {}
    environments: ClassVar[list[dict[str, str]]] = []
    fails: ClassVar[bool] = False
    answers: ClassVar[Event | None] = None
    """Reads wait for this before they begin."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.registered: dict[int, int] = {}
        self.descriptions: dict[str, dict[int, int]] = {}
        self.running: dict[int, tuple[int, int, int]] = {}
        self.numbers = iter(range(1, 1 << 30))

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        self.calls.append(("initialize", host, metadata, protocol, device))
        self.environments.append({name: value for name, value in os.environ.items() if name.startswith("MC_")})
        if self.fails:
            return -1
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self.listener.getsockname()[1]
        self.made[self.port] = self
        return 0

    def get_rpc_port(self) -> int:
        return self.port

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        self.calls.append(("register", len(addresses)))
        for address, nbytes in zip(addresses, sizes, strict=True):
            if nbytes == 0:
                return -1
            if any(start < address + nbytes and address < start + n for start, n in self.registered.items()):
                return -7
            self.registered[address] = nbytes
        return 0

    def batch_unregister_memory(self, addresses: list[int]) -> int:
        self.calls.append(("unregister", len(addresses)))
        return min(0 if self.registered.pop(address, None) else -3 for address in addresses)

    def batch_transfer_async_read(self, name: str, into: list[int], source: list[int], nbytes: list[int]) -> int:
        assert len(into) == len(source) == len(nbytes) == 1
        if self.answers is not None:
            self.answers.wait(SOON)
        port = int(name.rpartition(":")[2])
        if port not in self.made:
            return 0
        own = name == f"127.0.0.1:{self.port}"
        known = self.registered if own else self.descriptions.setdefault(name, dict(self.made[port].registered))
        within = any(start <= source[0] and source[0] + nbytes[0] <= start + n for start, n in known.items())
        ours = any(start <= into[0] and into[0] + nbytes[0] <= start + n for start, n in self.registered.items())
        if not within or not ours:
            return 0
        number = next(self.numbers)
        self.running[number] = into[0], source[0], nbytes[0]
        return number

    def transfer_check_status(self, number: int) -> int:
        into, source, nbytes = self.running.pop(number)  # a KeyError stands for a segmentation fault
        ctypes.memmove(into, source, nbytes)
        return 1


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeMooncake]]:
    """Two RDMA NICs, and a wheel that contains the fake, for one test."""
    for nic in ("mlx5_0", "mlx5_1"):
        (tmp_path / nic).mkdir()
    module = ModuleType("mooncake.engine")
    module.TransferEngine = FakeMooncake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    monkeypatch.setattr(library, "installed_wheel", lambda: library.Wheel("mooncake-transfer-engine", "0"))
    monkeypatch.setattr(fabrics, "INFINIBAND", tmp_path)
    monkeypatch.setattr(engine, "_engines", {})
    for name, value in (("made", {}), ("environments", []), ("fails", False), ("answers", None)):
        monkeypatch.setattr(FakeMooncake, name, value)
    yield FakeMooncake
    for one in FakeMooncake.made.values():
        one.listener.close()
    for one in FakeMooncake.made.values():
        assert one.registered == {}, "something stayed registered"
        assert one.running == {}, "the status of a read was not asked for"


class TestRdmaOnAFake(TransportSuite):
    one_sided = True
    ways = ("within one process",)
    big = 1 << 20

    def make(self) -> tensorfork.Transport:
        transport = TransferEngine(fabric="rdma", keep_registered=False, piece=1 << 20)
        transport.piece = 1 << 14
        return transport


class Lease:
    """A lease between two transports of this process, without a model."""

    def __init__(self, seed: TransferEngine, fork: TransferEngine, memory: GuardedMemory, into: GuardedMemory) -> None:
        facts = fork.facts(into.regions)
        theirs, sources = seed.cover(memory.regions)
        self.export = seed.export(theirs, Site("127.0.0.1", "127.0.0.1"), facts, time.monotonic() + SOON)
        self.remote = [RemoteRegion(one.id, one.nbytes, one.device) for one in theirs]
        self.channel = QueueChannel(lambda _: None)
        self._fork = fork
        self._regions, places = fork.cover(into.regions)
        self.copies = [
            Copy(0, source.region, source.offset, place.region, place.offset, nbytes)
            for source, place, nbytes in zip(sources, places, into.sizes, strict=True)
        ]

    def open(self, seconds: float = SOON) -> tensorfork.Session:
        until = time.monotonic() + seconds
        return self._fork.open(self.export.offer, "127.0.0.1", self.remote, self._regions, self.channel, until)

    def pull(self) -> None:
        session = self.open()
        done: list[int] = []
        session.pull(self.copies, time.monotonic() + SOON, done.append, Event())
        assert sorted(done) == list(range(len(self.copies)))
        session.close(time.monotonic() + SOON)

    def close(self) -> bool:
        return self.export.close(time.monotonic() + SOON)


def rdma(**settings: Any) -> TransferEngine:
    return TransferEngine(fabric="rdma", **settings)


def memory(number: int) -> GuardedMemory:
    return GuardedMemory("cpu", [5000, 70_000, 1], number)


def test_an_engine_gets_the_nics_to_use_and_never_falls_back_to_tcp(
    fake: type[FakeMooncake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    monkeypatch.setenv("MC_INTRANODE_NVLINK", "1")
    lease = Lease(rdma(nics=["mlx5_1"]), rdma(nics=["mlx5_1"]), memory(1), memory(2))
    lease.close()
    [one] = fake.made.values()
    assert one.calls[0] == ("initialize", "127.0.0.1", "P2PHANDSHAKE", "rdma", "mlx5_1")
    assert fake.environments[0].get("MC_FORCE_HCA") == "1"
    assert not {"MC_FORCE_TCP", "MC_INTRANODE_NVLINK"} & fake.environments[0].keys()
    assert os.environ["MC_FORCE_TCP"] == "1"
    assert "MC_FORCE_HCA" not in os.environ


def test_facts_list_the_nics_that_may_be_used() -> None:
    assert rdma().facts([])["nics"] == ["mlx5_0", "mlx5_1"]
    assert rdma(nics=["mlx5_1", "mlx5_7"]).facts([])["nics"] == ["mlx5_1"]


def test_both_sides_register_each_region_once(fake: type[FakeMooncake]) -> None:
    seed, into = memory(1), memory(2)
    lease = Lease(rdma(keep_registered=False), rdma(), seed, into)
    [one] = fake.made.values()
    assert one.registered == {region.address: region.nbytes for region in seed.regions}
    session = lease.open()
    assert one.registered == {region.address: region.nbytes for region in [*seed.regions, *into.regions]}
    session.close(time.monotonic() + SOON)
    assert one.registered == {region.address: region.nbytes for region in seed.regions}
    assert lease.close()


def test_a_seeds_memory_stays_registered_until_the_seed_is_closed(fake: type[FakeMooncake]) -> None:
    seed, offered = memory(1), rdma()
    first = Lease(offered, rdma(), seed, memory(2))
    first.pull()
    assert first.close() is False, "a fork that has the keys can still read it"
    [one] = fake.made.values()
    registered = one.calls.count(("register", 3))
    second = Lease(offered, rdma(), seed, memory(3))
    assert one.calls.count(("register", 3)) == registered, "it was registered already"
    second.pull()
    second.close()
    assert one.registered == {region.address: region.nbytes for region in seed.regions}
    offered.forget(seed.regions)
    assert one.registered == {}


def test_a_transport_without_references_keeps_nothing_registered(fake: type[FakeMooncake]) -> None:
    lease = Lease(rdma(), rdma(), memory(1), memory(2))
    lease.close()
    del lease
    assert next(iter(fake.made.values())).registered == {}


def test_a_seed_does_not_unregister_memory_that_another_seed_shares(fake: type[FakeMooncake]) -> None:
    shared = memory(1)
    one, other = Lease(rdma(), rdma(), shared, memory(2)), Lease(rdma(), rdma(), shared, memory(3))
    one._fork.forget(shared.regions)
    one.close()
    other.pull()
    other.close()


def test_a_region_in_several_registrations_is_read_in_parts_that_cross_no_boundary(fake: type[FakeMooncake]) -> None:
    theirs, ours = torch.arange(10_000, dtype=torch.int64).to(torch.uint8), torch.zeros(10_000, dtype=torch.uint8)
    seed, until = rdma(keep_registered=False), time.monotonic() + SOON
    middle = Region(0, theirs.data_ptr() + 2000, 2000, "cpu")
    whole, into = Region(0, theirs.data_ptr(), 10_000, "cpu"), Region(0, ours.data_ptr(), 10_000, "cpu")
    exports = [seed.export([one], Site("127.0.0.1", "127.0.0.1"), seed.facts([into]), until) for one in (middle, whole)]
    [one] = fake.made.values()
    assert len(one.registered) == 3
    session = rdma().open(
        exports[1].offer, "127.0.0.1", [RemoteRegion(0, 10_000, "cpu")], [into], QueueChannel(lambda _: None), until
    )
    done: list[int] = []
    session.pull([Copy(0, 0, 1, 0, 1, 9998)], until, done.append, Event())
    assert done == [0]
    assert torch.equal(ours[1:-1], theirs[1:-1])
    session.close(until)
    for export in exports:
        export.close(until)


def test_memory_that_was_registered_again_is_read_by_another_address(
    fake: type[FakeMooncake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "local_engine", lambda nonce: None)  # as if the fork were another process
    seed, offered = memory(1), rdma(keep_registered=False, nics=["mlx5_1"])
    for number in range(2, 5):
        into = memory(number)
        lease = Lease(offered, rdma(), seed, into)
        lease.pull()
        lease.close()
        for i, nbytes in enumerate(seed.sizes):
            assert torch.equal(into.view(i, 0, nbytes), seed.view(i, 0, nbytes))
    theirs, ours = fake.made.values()
    assert list(ours.descriptions) == [f"127.0.0.1:{zeros}{theirs.port}" for zeros in ("", "0", "00")]


def test_memory_that_stays_registered_is_read_by_the_same_address(
    fake: type[FakeMooncake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "local_engine", lambda nonce: None)
    seed, offered = memory(1), rdma(nics=["mlx5_1"])
    for number in range(2, 5):
        lease = Lease(offered, rdma(), seed, memory(number))
        lease.pull()
        lease.close()
    theirs, ours = fake.made.values()
    assert list(ours.descriptions) == [f"127.0.0.1:{theirs.port}"]


def test_an_engine_that_does_not_start_is_reported_and_the_next_attempt_makes_another(fake: type[FakeMooncake]) -> None:
    fake.fails = True
    with pytest.raises(TransportUnavailable, match="cannot start on rdma"):
        Lease(rdma(), rdma(), memory(1), memory(2))
    fake.fails = False
    Lease(rdma(), rdma(), memory(1), memory(2)).close()


def test_a_peer_that_does_not_answer_costs_the_deadline_and_the_engine_is_replaced(fake: type[FakeMooncake]) -> None:
    lease = Lease(rdma(keep_registered=False), rdma(), memory(1), memory(2))
    fake.answers = Event()
    with pytest.raises(TransportUnavailable, match="did not answer by the deadline"):
        lease.open(seconds=0.2)
    fake.answers.set()
    lease.close()
    fake.answers = None
    again = Lease(rdma(keep_registered=False), rdma(), memory(3), memory(4))
    again.pull()
    again.close()
    assert len(fake.made) == 2
    first = next(iter(fake.made.values()))
    until = time.monotonic() + SOON
    while first.registered or first.running:  # the thread that hung is about to poll its read
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_read_of_memory_that_is_not_registered_fails(fake: type[FakeMooncake]) -> None:
    lease = Lease(rdma(keep_registered=False), rdma(), memory(1), memory(2))
    session = lease.open()
    lease.close()
    with pytest.raises(TransferFailed, match="refused to read"):
        session.pull(lease.copies, time.monotonic() + SOON, lambda _: None, Event())
    session.close(time.monotonic() + SOON)


def test_auto_takes_rdma_before_zeromq() -> None:
    tensors = {"a": torch.arange(1000.0)}
    with tensorfork.publish(tensors) as seed:
        report = tensorfork.fork_into({"a": torch.zeros(1000)}, seed.address)
    assert (report.transport, report.fabric) == ("transfer_engine", "rdma")


def test_facts_do_not_import_mooncake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mooncake.engine")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    rdma().facts(memory(1).regions)
    assert "mooncake.engine" not in sys.modules
