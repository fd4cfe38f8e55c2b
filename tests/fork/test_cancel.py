"""A fork that waits for something that does not come is cancelled from another thread, at every step."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import torch
from engine_seeds import needs_mooncake, small_pieces
from lying_seeds import Liar, kind_of
from processes import Child
from seed_leases import under_way, until

import tensorfork
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.fork import verification
from tensorfork.model.install import Installation
from tensorfork.testing import Fault, FaultyTransport
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.transfer_engine import TransferEngine
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import reach

pytestmark = pytest.mark.slow

SECONDS = 120.0
"""Of every fork here. One that is not cancelled is a failure, long after `SOON`."""
SOON = 20.0
NAMES = ("a", "b", "c")
KINDS = ["in place", "meta"]


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((200_000,), value) for name in NAMES}


def target(kind: str) -> dict[str, torch.Tensor]:
    with torch.device("meta" if kind == "meta" else "cpu"):
        return model(0.0)


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(model(), transports=["zeromq", "gloo"]) as seed:
        yield seed


def cancelled(ours: dict[str, torch.Tensor], address: str, cancel: threading.Event, **terms: Any) -> Any:
    """Fork; it is cancelled soon. Meta tensors stay meta, tensors that are said to be complete are."""
    meta, started = ours["a"].is_meta, time.monotonic()
    with pytest.raises(tensorfork.ForkCancelled, match="cancelled") as caught:
        tensorfork.fork_into(ours, address, cancel=cancel, timeout=SECONDS, **{"device": "cpu"} | terms)
    assert time.monotonic() - started < SOON
    assert all(tensor.is_meta == meta for tensor in ours.values())
    if not meta:
        assert all(bool((ours[name] == 1).all()) for name in caught.value.complete)
    return caught.value


def untouched(ours: dict[str, torch.Tensor]) -> bool:
    return all(tensor.is_meta or not tensor.any() for tensor in ours.values())


def settled(seed: tensorfork.Seed) -> None:
    until(lambda: not seed.stats().running, "the lease is given back")


# The conversation: the seed does not answer.

STEPS = {"hello": "Welcome", "layout": "Pages", "lease": "Leased", "check": "Checked", "digests": "Digests"}
"""For each step the reply that it waits for."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_is_cancelled_while_it_waits_for_an_answer(seed: tensorfork.Seed, step: str, kind: str) -> None:
    cancel = threading.Event()

    def keep_back(frames: list[bytes]) -> list[bytes] | None:
        if kind_of(frames) == STEPS[step]:
            cancel.set()
        return None if cancel.is_set() else frames

    ours = target(kind)
    with Liar(seed.address, keep_back) as address:
        error = cancelled(ours, address, cancel, transport="zeromq")
    if step in ("check", "digests"):
        assert set(error.complete) == set(NAMES)
    else:
        assert error.complete == ()
        assert untouched(ours)
    assert error.undrained == ()
    settled(seed)


def test_a_fork_is_cancelled_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, over = threading.Event(), threading.Event()

    def look_up(*args: Any, **options: Any) -> Any:
        cancel.set()
        over.wait()
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(reach, "HELLO_TIMEOUT", SECONDS)
    ours = target("in place")
    try:
        cancelled(ours, "tcp://seed.example:4180", cancel)
    finally:
        over.set()
    assert untouched(ours)


@pytest.mark.parametrize("terms", [{"wait": float("inf")}, {"restarts": 3}], ids=["wait", "restarts"])
def test_a_fork_is_cancelled_while_it_waits_for_a_seed_that_sleeps(terms: dict[str, Any]) -> None:
    cancel, ours = threading.Event(), target("in place")
    with tensorfork.publish(model()) as seed, ThreadPoolExecutor(1) as pool:
        seed.suspend()
        forking = pool.submit(cancelled, ours, seed.address, cancel, **terms)
        until(lambda: seed.stats().refused > 2, "it has asked several times")
        cancel.set()
        assert isinstance(forking.result().__cause__, tensorfork.SeedAsleep)
    assert untouched(ours)


def test_a_fork_that_is_cancelled_before_it_begins_asks_nobody(seed: tensorfork.Seed) -> None:
    cancel, ours = threading.Event(), target("in place")
    cancel.set()
    granted = seed.stats().granted
    cancelled(ours, seed.address, cancel)
    assert untouched(ours)
    with pytest.raises(tensorfork.ForkCancelled):
        tensorfork.fork(seed.address, cancel=cancel, timeout=SECONDS)
    assert seed.stats().granted == granted


def test_a_fork_that_is_not_cancelled_takes_no_notice(seed: tensorfork.Seed) -> None:
    ours = target("meta")
    assert tensorfork.fork_into(ours, seed.address, cancel=threading.Event(), timeout=SECONDS).verified
    assert bool((ours["c"] == 1).all())


# Opening a transport.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["gloo", "auto"])
def test_a_fork_is_cancelled_while_a_group_is_created(seed: tensorfork.Seed, transport: str, kind: str) -> None:
    """The seed says nothing on the lease's channel. With `auto`, no other transport is tried then."""
    cancel, leases, ours = threading.Event(), [], target(kind)

    def keep_back(frames: list[bytes]) -> list[bytes] | None:
        leases.append(kind_of(frames) == "Leased")
        if kind_of(frames) == "Say":
            cancel.set()
        return None if cancel.is_set() else frames

    with Liar(seed.address, keep_back) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorfork.transports.registry.AUTO", ("gloo", "zeromq"))
        cancelled(ours, address, cancel, transport=transport)
    assert leases.count(True) == 1
    assert untouched(ours)
    settled(seed)


@contextmanager
def silent_port(then: Callable[[], object]) -> Iterator[int]:
    """A port that takes a connection and says nothing, as that of a process that is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(lambda: (listener.accept(), then()))
        yield listener.getsockname()[1]
        accepting.result()[0][0].close()


def test_a_fork_is_cancelled_while_the_seed_s_store_does_not_answer(seed: tensorfork.Seed) -> None:
    cancel, ours = threading.Event(), target("in place")

    class Silent(Gloo):
        def open(self, offer: bytes, *rest: Any) -> Any:
            token, _, *others = msgpack.unpackb(offer)
            return super().open(msgpack.packb([token, port, *others]), *rest)

    with silent_port(cancel.set) as port:
        cancelled(ours, seed.address, cancel, transport=Silent(joining=SECONDS))
    assert untouched(ours)
    settled(seed)


@needs_mooncake
def test_a_fork_is_cancelled_while_the_seed_s_engine_does_not_answer() -> None:
    cancel, ours = threading.Event(), target("in place")

    class Silent(TransferEngine):
        def open(self, offer: bytes, host: str, remote: Any, *rest: Any) -> Any:
            regions = {region.id: OfferedRegion(1 << 20, ()) for region in remote}
            return super().open(Offer("tcp", b"silent..", bytes(8), port, regions).pack(), host, remote, *rest)

    with tensorfork.publish(model(), transports=["transfer_engine:tcp"]) as seed, silent_port(cancel.set) as port:
        cancelled(ours, seed.address, cancel, transport=Silent(fabric="tcp"))
        settled(seed)
    assert untouched(ours)


def test_a_transport_that_waits_for_something_of_its_own_can_ask_its_channel(seed: tensorfork.Seed) -> None:
    cancel, ours = threading.Event(), target("in place")

    class Waits(ZeroMQ):
        def open(self, offer: bytes, host: str, remote: Any, regions: Any, channel: Any, deadline: float) -> Any:
            channel.check()
            cancel.set()
            channel.check()
            raise AssertionError("it was told to end")

    cancelled(ours, seed.address, cancel, transport=Waits())
    settled(seed)


# The pull: the seed's process is stopped when the first bytes have arrived.


def big() -> dict[str, torch.Tensor]:
    return {name: torch.full((16 << 20,), 1, dtype=torch.uint8) for name in NAMES}


def publish_over(pipe: Any, transports: Any) -> None:
    with tensorfork.publish(big(), transports=transports) as seed:
        pipe.send(seed.address)
        pipe.recv()


PULLS = [
    pytest.param(["zeromq"], lambda: FaultyTransport(ZeroMQ(), Fault(), piece=1 << 20), id="zeromq"),
    pytest.param([Gloo(rate_limit=16 << 20)], lambda: Gloo(parcel=1 << 20, bucket=1 << 20, small=1000), id="gloo"),
    pytest.param(["transfer_engine:tcp"], small_pieces, id="transfer_engine", marks=needs_mooncake),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("offered", "transport"), PULLS)
def test_a_fork_is_cancelled_while_nothing_arrives(offered: Any, transport: Any, kind: str) -> None:
    cancel = threading.Event()
    with Child(publish_over, offered) as child, torch.device("meta" if kind == "meta" else "cpu"):
        address, ours = child.recv(), {name: torch.zeros(16 << 20, dtype=torch.uint8) for name in NAMES}

        def progress(moved: int, total: int) -> None:
            if moved and not cancel.is_set():
                child.stop()
                cancel.set()

        with torch.device("cpu"):
            error = cancelled(ours, address, cancel, transport=transport(), progress=progress)
        assert set(error.complete) < set(NAMES)
        assert isinstance(error.__cause__, tensorfork.TransferFailed)
        assert error.undrained == error.__cause__.undrained
        child.resume()


def test_a_seed_whose_fork_is_cancelled_under_way_has_its_lease_back_and_serves_on(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(seed)
    monkeypatch.setattr(seed._service._leases, "peer_gone", lambda peer: [])  # only the fork gives it back
    for kind in KINDS:
        cancel, ours = threading.Event(), target(kind)
        error = cancelled(ours, seed.address, cancel, transport=under_way(cancel.set))
        assert len(error.complete) == 1
        settled(seed)
        tensorfork.fork_into(ours, seed.address, device="cpu", transport="zeromq", timeout=SECONDS)
        assert all(bool((tensor == 1).all()) for tensor in ours.values())


# After the bytes.


def test_digests_are_not_computed_to_the_end_for_a_fork_that_is_cancelled() -> None:
    cancel = threading.Event()
    digests = ArrivalDigests(lambda: {"a": torch.ones(1000)}, [], set(), {}, [], cancel)
    cancel.set()
    with pytest.raises(tensorfork.ForkCancelled):
        digests.pieces()
    digests.close()


@pytest.mark.parametrize("kind", KINDS)
def test_before_tensors_take_their_memory_it_is_not_too_late(
    seed: tensorfork.Seed, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, compare = threading.Event(), verification.compare_digests
    monkeypatch.setattr(verification, "compare_digests", lambda *args: (compare(*args), cancel.set())[0])
    error = cancelled(target(kind), seed.address, cancel)
    assert set(error.complete) == set(NAMES)
    settled(seed)


def test_what_progress_raises_is_not_taken_for_a_fork_whose_bytes_are_all_here(seed: tensorfork.Seed) -> None:
    mine = tensorfork.ForkCancelled("enough")

    def progress(arrived: int, total: int) -> None:
        raise mine

    with pytest.raises(tensorfork.ForkCancelled) as caught:
        tensorfork.fork_into(target("meta"), seed.address, device="cpu", progress=progress, timeout=SECONDS)
    assert caught.value is mine
    settled(seed)


def test_once_tensors_take_their_memory_it_is_too_late(seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, ours = threading.Event(), target("meta")
    run = Installation.run
    monkeypatch.setattr(Installation, "run", lambda *args: (cancel.set(), run(*args))[1])
    assert tensorfork.fork_into(ours, seed.address, device="cpu", cancel=cancel, timeout=SECONDS).verified
    assert cancel.is_set()
    assert all(bool((tensor == 1).all()) for tensor in ours.values())


@pytest.mark.parametrize("wrong", [True, 1.0, "soon", object()], ids=["bool", "float", "text", "object"])
def test_what_is_no_event_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"cancel must be a threading\.Event"):
        tensorfork.fork("tcp://127.0.0.1:1", cancel=wrong)
