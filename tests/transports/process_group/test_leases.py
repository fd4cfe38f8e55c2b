"""Leases of process groups, with the seed's end and the fork's spoken to directly; over gloo."""

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
from gloo_leases import SECONDS, export, hear, opened, say, served, wait_until

import tensorfork
from tensorfork import Copy, TransferFailed, TransportUnavailable
from tensorfork.errors import PeerUnreachable
from tensorfork.testing.memory import Memory
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.pair_group import FORK
from tensorfork.transports.process_group.region_tensors import RegionTensors as RegionsOfOneSide
from tensorfork.transports.process_group.rendezvous import reach_store, serve_store
from tensorfork.transports.process_group.tasks import run_together


def test_a_fork_that_never_joins_costs_a_thread_until_the_lease_ends() -> None:
    with served(export(Memory("cpu", [1000], 1))) as (_, ended):
        pass
    assert not ended


@pytest.mark.parametrize("answered", [False, True], ids=["a seed that says nothing", "a seed that waits in the group"])
def test_a_session_that_is_closed_while_the_two_sides_meet_leaves_nobody_waiting(answered: bool) -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    asked = threading.Event()
    made = export(memory, joining=SECONDS)
    before = set(threading.enumerate())

    def left(*names: str) -> bool:
        return any(thread.name in names for thread in set(threading.enumerate()) - before)

    with served(made, lambda words: (asked.set(), words if answered else None)[1]) as (speaker, _):
        remote = [tensorfork.RemoteRegion(region.id, region.nbytes, region.device) for region in memory.regions]
        options = {"joining": 4 * SECONDS}
        session = Gloo(**options).open(  # type: ignore[arg-type]
            made.offer, "127.0.0.1", remote, into.regions, speaker, time.monotonic() + 4 * SECONDS
        )
        assert asked.wait(SECONDS), "it does not meet the seed by itself"
        session.close(time.monotonic() + SECONDS)
        wait_until(lambda: not left("tensorfork-meet"))
        with pytest.raises(TransferFailed):
            session.pull([], time.monotonic() + SECONDS, lambda i: None, threading.Event())
    wait_until(lambda: not left("tensorfork-meet", "tensorfork-join"))


def test_a_lease_whose_time_is_over_ends_by_itself() -> None:
    with served(export(Memory("cpu", [1000], 1), seconds=0.2)) as (_, ended):
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


def test_a_fork_that_says_it_joins_and_does_not_come_is_told_so() -> None:
    with served(export(Memory("cpu", [1000], 1), joining=0.3)) as (speaker, ended):
        say(speaker, "join", [["cpu", "cpu"]], [None, None, None], "127.0.0.1")
        assert hear(speaker) == ["ready"]
        assert hear(speaker)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "words",
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
        "no such lane",
        "no such device",
        "many CTAs",
        "many lanes",
        "half a join",
        "nonsense",
        "numbers",
    ],
)
def test_a_fork_that_talks_nonsense_is_refused_and_the_seed_goes_on(words: list[Any]) -> None:
    with served(export(Memory("cpu", [1000], 1))) as (speaker, ended):
        say(speaker, *words)
        assert hear(speaker)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "stretch", [(7, 0, 1001), (7, 1000, 1), (8, 0, 1), (7, (1 << 64) - 1, 2), (7, 0, (1 << 64) - 1)]
)
def test_a_fork_that_asks_for_other_memory_gets_none(stretch: tuple[int, int, int]) -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    memory_id = memory.regions[0].id
    made = export(memory)
    with served(made) as (speaker, ended), opened(memory, into, speaker, made.offer):
        id = memory_id if stretch[0] == 7 else 12345
        page = b"\x00\x00\x00\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, *stretch[1:]))
        say(speaker, "parcels", True, page)
        words = hear(speaker)
        assert words[0] == "failed"
        assert "outside" in words[1]
        wait_until(lambda: bool(ended))
    assert into.wrong() is None


def test_a_bucket_holds_no_more_than_the_seed_said() -> None:
    memory, into = Memory("cpu", [5000], 1), Memory("cpu", [5000], 2)
    made = export(memory, bucket=1000, small=1000)
    with served(made) as (speaker, _), opened(memory, into, speaker, made.offer):
        id = memory.regions[0].id
        say(
            speaker,
            "parcels",
            True,
            b"\x00\x00\x01\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, 0, 1001)),
        )
        words = hear(speaker)
        assert words[0] == "failed"
        assert "bucket" in words[1]


def test_a_pull_that_is_cancelled_when_its_last_copy_is_done_has_failed() -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    made, cancel = export(memory), threading.Event()
    with served(made) as (speaker, _), opened(memory, into, speaker, made.offer) as session:
        copy = Copy(0, memory.regions[0].id, 0, into.regions[0].id, 0, 1000)
        with pytest.raises(TransferFailed, match="cancelled"):
            session.pull([copy], time.monotonic() + SECONDS, lambda _: cancel.set(), cancel)


def test_a_connection_that_breaks_amid_a_message_is_noticed_at_once() -> None:
    nbytes = 64 << 20
    theirs, ours = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    with pair_of_lanes(theirs, ours) as (seed, fork):
        until = time.monotonic() + SECONDS
        sending = seed.begin([(0, 0, nbytes)], False, until)
        fork.begin([(0, 0, nbytes)], False, until)
        while not ours[0]:
            assert time.monotonic() < until
        fork.abort()
        started = time.monotonic()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(sending, lambda: None)
        assert time.monotonic() - started < SECONDS / 2
        arrived = ours.clone()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(seed.begin([(0, 0, 1)], False, until), lambda: None)
        assert torch.equal(arrived, ours), "bytes came after an abort"


@contextmanager
def pair_of_lanes(theirs: torch.Tensor, ours: torch.Tensor) -> Iterator[tuple[GlooGroup, GlooGroup]]:
    """Two lanes over gloo that are connected, each with a region 0."""
    from torch.distributed import PrefixStore

    until = time.monotonic() + SECONDS
    _, host, port = serve_store("127.0.0.1", None, until)
    stores = [PrefixStore("x", reach_store(host, port, until)) for _ in range(2)]

    def lane(rank: int, tensor: torch.Tensor) -> Callable[[], GlooGroup]:
        memory = RegionsOfOneSide([tensorfork.Region(0, tensor.data_ptr(), tensor.nbytes, "cpu")])

        def make() -> GlooGroup:
            made = GlooGroup(stores[rank], rank, memory, "cpu", 1 << 20, "127.0.0.1", until)
            made.greet(until)
            return made

        return make

    lanes = run_together([lane(0, theirs), lane(1, ours)], GlooGroup.close, "test-lane", lambda: None)
    try:
        yield lanes[0], lanes[1]
    finally:
        for one in lanes:
            one.close()


def test_a_transfer_that_was_aborted_and_returns_is_no_success() -> None:
    class Work:
        def wait(self, timeout: Any) -> bool:
            lane.aborted = True
            return True

    work = Work()
    lane = object.__new__(GlooGroup)
    lane.rank, lane.aborted, lane._stream, lane._under_way = FORK, False, None, [work]
    with pytest.raises(TransferFailed):
        lane.finish(([work], (), None), lambda: None)


# Ports.


def test_stores_listen_within_the_range_and_ports_are_free_again_afterwards() -> None:
    ports = free_range(2)
    memory = Memory("cpu", [1000], 1)
    for _ in range(2):
        first, second = export(memory, ports=ports), export(memory, ports=ports)
        assert {msgpack.unpackb(one.offer)[1] for one in (first, second)} == set(ports)
        with pytest.raises(TransportUnavailable, match="longer range"):
            export(memory, ports=ports)
        assert first.close(time.monotonic() + SECONDS)
        assert second.close(time.monotonic() + SECONDS)


def test_a_seed_listens_where_it_was_told_to_and_nowhere_else() -> None:
    made = export(Memory("cpu", [1000], 1))
    port = msgpack.unpackb(made.offer)[1]
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), SECONDS)
    made.close(time.monotonic() + SECONDS)


def free_range(length: int) -> range:
    """Ports that were free a moment ago."""
    for start in range(23_000, 60_000, 97):
        with ExitStack() as held:
            try:
                for port in range(start, start + length):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return range(start, start + length)
    raise AssertionError("there is no free range of ports")


ENDS = """
import torch
import tensorfork
from tensorfork.transports.process_group import Gloo

seed = tensorfork.publish({"x": torch.ones(8)}, transports=[Gloo()])
for _ in range(3):
    tensorfork.fork(seed.address, transport=Gloo(), timeout=60)
print("forked")
"""


def test_a_process_that_ends_without_closing_its_seed_ends_well() -> None:
    """A thread of the seed's that comes back from torch when Python has ended would abort it."""
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=2 * SECONDS)
    assert (ended.returncode, ended.stdout) == (0, "forked\n"), ended.stderr
