"""Leases of process groups, whose messages the tests send and receive themselves; over gloo."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import pytest
import torch
from gloo_leases import SECONDS, export, opened, recv, send, served, wait_until

import tensorfork
from tensorfork import Copy, TransferFailed, TransportUnavailable
from tensorfork.errors import PeerUnreachable
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.pair_group import FORK
from tensorfork.transports.process_group.region_tensors import RegionTensors
from tensorfork.transports.process_group.rendezvous import connect_store, serve_store
from tensorfork.transports.process_group.tasks import run_together


def test_a_fork_that_never_joins_costs_a_thread_until_the_lease_ends() -> None:
    with served(export(GuardedMemory("cpu", [1000], 1))) as (_, ended):
        pass
    assert not ended


@pytest.mark.parametrize(
    "seed_answers", [False, True], ids=["a seed that says nothing", "a seed that waits in the group"]
)
def test_a_session_that_is_closed_while_its_group_is_created_leaves_no_thread(seed_answers: bool) -> None:
    memory, into = GuardedMemory("cpu", [1000], 1), GuardedMemory("cpu", [1000], 2)
    asked = threading.Event()
    made = export(memory, joining=SECONDS)
    before = set(threading.enumerate())

    def running(*names: str) -> bool:
        return any(thread.name in names for thread in set(threading.enumerate()) - before)

    with served(made, lambda message: (asked.set(), message if seed_answers else None)[1]) as (channel, _):
        remote = [tensorfork.RemoteRegion(region.id, region.nbytes, region.device) for region in memory.regions]
        options = {"joining": 4 * SECONDS}
        session = Gloo(**options).open(  # type: ignore[arg-type]
            made.offer, "127.0.0.1", remote, into.regions, channel, time.monotonic() + 4 * SECONDS
        )
        assert asked.wait(SECONDS), "it does not join by itself"
        session.close(time.monotonic() + SECONDS)
        wait_until(lambda: not running("tensorfork-join"))
        with pytest.raises(TransferFailed):
            session.pull([], time.monotonic() + SECONDS, lambda i: None, threading.Event())
    wait_until(lambda: not running("tensorfork-join", "tensorfork-group", "tensorfork-store"))


def test_a_lease_whose_time_is_over_ends_by_itself() -> None:
    with served(export(GuardedMemory("cpu", [1000], 1), seconds=0.2)) as (_, ended):
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


def test_a_fork_that_asks_to_join_and_does_not_connect_is_told_so() -> None:
    with served(export(GuardedMemory("cpu", [1000], 1), joining=0.3)) as (channel, ended):
        send(channel, "join", [["cpu", "cpu"]], [None, None, None], "127.0.0.1")
        assert recv(channel) == ["ready"]
        assert recv(channel)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "message",
    [
        ["parcels", True, b"short"],
        ["parcels", True, b"\x07\x00\x00\x00\x01\x00\x00\x00" + bytes(24)],
        ["join", [["cuda:9", "cpu"]], [None, None, None], "127.0.0.1"],
        ["join", [["cpu", "cpu"]], [None, 1000, None], "127.0.0.1"],
        ["join", [["cpu", "cpu"]] * 300, [None, None, None], "127.0.0.1"],
        ["join", "everything"],
        ["nonsense"],
        [1, 2],
    ],
    ids=[
        "half a page",
        "no such group",
        "no such device",
        "many CTAs",
        "many groups",
        "half a join",
        "nonsense",
        "numbers",
    ],
)
def test_a_fork_that_sends_nonsense_is_refused_and_the_seed_goes_on(message: list[Any]) -> None:
    with served(export(GuardedMemory("cpu", [1000], 1))) as (channel, ended):
        send(channel, *message)
        assert recv(channel)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "byte_range", [(7, 0, 1001), (7, 1000, 1), (8, 0, 1), (7, (1 << 64) - 1, 2), (7, 0, (1 << 64) - 1)]
)
def test_a_fork_that_asks_for_other_memory_gets_none(byte_range: tuple[int, int, int]) -> None:
    memory, into = GuardedMemory("cpu", [1000], 1), GuardedMemory("cpu", [1000], 2)
    memory_id = memory.regions[0].id
    made = export(memory)
    with served(made) as (channel, ended), opened(memory, into, channel, made.offer):
        id = memory_id if byte_range[0] == 7 else 12345
        page = b"\x00\x00\x00\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, *byte_range[1:]))
        send(channel, "parcels", True, page)
        message = recv(channel)
        assert message[0] == "failed"
        assert "outside" in message[1]
        wait_until(lambda: bool(ended))
    assert into.first_difference() is None


def test_a_fork_that_asks_for_more_than_a_bucket_holds_is_refused() -> None:
    memory, into = GuardedMemory("cpu", [5000], 1), GuardedMemory("cpu", [5000], 2)
    made = export(memory, bucket=1000, small=1000)
    with served(made) as (channel, _), opened(memory, into, channel, made.offer):
        id = memory.regions[0].id
        send(
            channel,
            "parcels",
            True,
            b"\x00\x00\x01\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, 0, 1001)),
        )
        message = recv(channel)
        assert message[0] == "failed"
        assert "bucket" in message[1]


def test_a_pull_that_is_cancelled_when_its_last_copy_is_done_has_failed() -> None:
    memory, into = GuardedMemory("cpu", [1000], 1), GuardedMemory("cpu", [1000], 2)
    made, cancel = export(memory), threading.Event()
    with served(made) as (channel, _), opened(memory, into, channel, made.offer) as session:
        copy = Copy(0, memory.regions[0].id, 0, into.regions[0].id, 0, 1000)
        with pytest.raises(TransferFailed, match="cancelled"):
            session.pull([copy], time.monotonic() + SECONDS, lambda _: cancel.set(), cancel)


def test_a_connection_that_breaks_amid_a_message_is_noticed_at_once() -> None:
    """On a busy machine a whole message may arrive before the abort; then another is sent."""
    assert any(breaks_amid_a_message(64 << 20) for _ in range(10)), "each message arrived whole before the abort"


def breaks_amid_a_message(nbytes: int) -> bool:
    """Abort the receiving side of a message that is arriving; False if it had arrived whole by then."""
    theirs, ours = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    with connected_groups(theirs, ours) as (seed, fork):
        deadline = time.monotonic() + SECONDS
        sending = seed.start([(0, 0, nbytes)], False, deadline)
        fork.start([(0, 0, nbytes)], False, deadline)
        while not ours[0]:
            assert time.monotonic() < deadline
        fork.abort()
        if ours[-1]:
            return False
        started = time.monotonic()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(sending, lambda: None)
        assert time.monotonic() - started < SECONDS / 2
        arrived = ours.clone()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(seed.start([(0, 0, 1)], False, deadline), lambda: None)
        assert torch.equal(arrived, ours), "bytes came after an abort"
        return True


@contextmanager
def connected_groups(theirs: torch.Tensor, ours: torch.Tensor) -> Iterator[tuple[GlooGroup, GlooGroup]]:
    """The two sides of a group over gloo, each with a region 0."""
    from torch.distributed import PrefixStore

    deadline = time.monotonic() + SECONDS
    _, host, port = serve_store("127.0.0.1", None, deadline)
    stores = [PrefixStore("x", connect_store(host, port, deadline)) for _ in range(2)]

    def creation(rank: int, tensor: torch.Tensor) -> Callable[[], GlooGroup]:
        memory = RegionTensors([tensorfork.Region(0, tensor.data_ptr(), tensor.nbytes, "cpu", stable=True)])

        def create() -> GlooGroup:
            group = GlooGroup(stores[rank], rank, memory, "cpu", 1 << 20, "127.0.0.1", deadline)
            group.handshake(deadline)
            return group

        return create

    groups = run_together([creation(0, theirs), creation(1, ours)], GlooGroup.close, "test-group", lambda: None)
    try:
        yield groups[0], groups[1]
    finally:
        for group in groups:
            group.close()


def test_an_operation_that_was_aborted_and_returns_has_failed() -> None:
    class Work:
        def wait(self, timeout: Any) -> bool:
            group.aborted = True
            return True

    work = Work()
    group = object.__new__(GlooGroup)
    group.rank, group.aborted, group._stream, group._in_flight = FORK, False, None, [work]
    with pytest.raises(TransferFailed):
        group.finish(([work], (), None), lambda: None)


# Ports.


def test_stores_listen_within_the_range_and_ports_are_free_again_afterwards() -> None:
    ports = free_range(2)
    memory = GuardedMemory("cpu", [1000], 1)
    for _ in range(2):
        first, second = export(memory, ports=ports), export(memory, ports=ports)
        assert {msgpack.unpackb(one.offer)[1] for one in (first, second)} == set(ports)
        with pytest.raises(TransportUnavailable, match="longer range"):
            export(memory, ports=ports)
        assert first.close(time.monotonic() + SECONDS)
        assert second.close(time.monotonic() + SECONDS)


def test_a_store_listens_at_the_seeds_address_and_nowhere_else() -> None:
    made = export(GuardedMemory("cpu", [1000], 1))
    port = msgpack.unpackb(made.offer)[1]
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), SECONDS)
    made.close(time.monotonic() + SECONDS)


def free_range(length: int) -> range:
    """Ports that were free just now."""
    for start in range(23_000, 60_000, 97):
        with ExitStack() as sockets:
            try:
                for port in range(start, start + length):
                    sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return range(start, start + length)
    raise AssertionError("there is no free range of ports")


SCRIPT = """
import torch
import tensorfork
from tensorfork.transports.process_group import Gloo

seed = tensorfork.publish({"x": torch.ones(8)}, transports=[Gloo()])
for _ in range(3):
    tensorfork.fork(seed.address, transport=Gloo(), timeout=60)
print("forked")
"""


def test_a_process_that_ends_without_closing_its_seed_ends_well() -> None:
    """A thread of the seed's that returned from torch after Python has ended would abort the process."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=2 * SECONDS)
    assert (ended.returncode, ended.stdout) == (0, "forked\n"), ended.stderr
