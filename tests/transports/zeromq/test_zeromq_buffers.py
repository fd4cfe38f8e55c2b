"""What a seed may send over ZeroMQ, and the buffers that it sends from."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import zmq
from attrs import evolve
from mapped_memory import PAGE, MappedMemory
from zeromq_export import (
    OFFER,
    SECONDS,
    ServedExport,
    dealer,
    recv_answer,
    request,
    soon,
    started_port,
    unused_channel,
)

from tensorfork import Copy, Region, RemoteRegion, Site, TransferFailed, TransportUnavailable
from tensorfork.memory import host_reads, host_slots
from tensorfork.memory.host_slots import SHARES, SlotPool
from tensorfork.sockets.port import Peer
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.transports.zeromq.protocol import WINDOW

OK, OUT_OF_BOUNDS, MOVED = 0, 1, 2
MOST = sum(count for count, _, _ in SHARES)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> SlotPool:
    """A pool that no other test uses."""
    pool = SlotPool()
    monkeypatch.setattr(host_slots, "pool", lambda: pool)
    return pool


@pytest.fixture(params=[False, True], ids=["copied", "lent"])
def stable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def ask(client: "zmq.Socket[bytes]", served: ServedExport, *ranges: tuple[int, int]) -> tuple[int, list[bytes]]:
    """The status of the answer to a request for these (offset, nbytes), and the frames behind it."""
    client.send(request(served.token, *[(served.region, *one) for one in ranges]))
    number, status, frames = recv_answer(client)
    assert number == 1
    return status, frames


# Only what was published is sent.


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 1), (99, 1), (99, 2), (0, 1000), (199, 2), (200, 100), (150, 200), (200, 1), (299, 1), (600, 1), (999, 1)],
)
def test_bytes_before_between_and_behind_what_was_published_are_refused(stable: bool, offset: int, nbytes: int) -> None:
    with (
        ServedExport(ZeroMQ(), 1000, published=[(100, 200), (300, 600)], stable=stable) as served,
        dealer(served) as client,
    ):
        assert ask(client, served, (offset, nbytes)) == (OUT_OF_BOUNDS, [])
        assert ask(client, served, (100, 100), (offset, nbytes)) == (OUT_OF_BOUNDS, [])


def test_published_ranges_are_sent_whole_and_in_part(stable: bool) -> None:
    expected = bytes(contents(3, [1000])[0].tolist())
    with (
        ServedExport(ZeroMQ(), 1000, published=[(100, 200), (300, 600)], stable=stable) as served,
        dealer(served) as client,
    ):
        status, frames = ask(client, served, (300, 300), (100, 100), (199, 1), (450, 20))
        assert status == OK
        assert frames == [expected[300:600] + expected[100:200] + expected[199:200] + expected[450:470]]


# Copied, or lent.


@pytest.mark.parametrize("ranges", [[(50, 100)], [(50, 40), (90, 60)]], ids=["one range", "two ranges"])
def test_libzmq_is_lent_the_memory_itself_only_if_it_is_stable_and_one_range(
    stable: bool, ranges: list[tuple[int, int]]
) -> None:
    lent: list[int] = []
    with ServedExport(ZeroMQ(), stable=stable) as served, dealer(served) as client:
        lend, start = served.export._port.lend, served.memory.regions[0].address

        def spy(peer: Peer, header: bytes, memory: tuple[int, int], *rest: Any) -> None:
            lent.append(memory[0])
            lend(peer, header, memory, *rest)

        served.export._port.lend = spy  # type: ignore[method-assign,assignment]
        expected = bytes(contents(3, [served.nbytes])[0][50:150].tolist())
        assert ask(client, served, *ranges) == (OK, [expected])
    assert (lent == [start + 50]) is (stable and len(ranges) == 1)


def test_a_fork_requests_large_ranges_of_stable_memory_by_themselves_and_small_ones_together(stable: bool) -> None:
    sizes = [300_000, 1000, 2000, 3 << 20, 100, 300_000, 300_000]
    requests: list[list[int]] = []
    with ServedExport(ZeroMQ(), 4 << 20, stable=stable) as served:
        read = served.export._read

        def spy(ranges: Sequence[tuple[int, int, int]], into: int) -> tuple[int, tuple[int, int] | None]:
            requests.append([nbytes for _, _, nbytes in ranges])
            return read(ranges, into)

        served.export._read = spy  # type: ignore[method-assign]
        served.fork(sizes=sizes)
    if stable:
        assert requests == [[300_000], [1000, 2000], [2 << 20], [1 << 20], [100], [300_000], [300_000]]
    else:
        assert len(requests) == 2
        assert sum(requests[0]) == 2 << 20


def test_a_share_is_held_for_as_long_as_the_lease_lasts(pool: SlotPool) -> None:
    with ServedExport(ZeroMQ()) as served:
        assert pool._memory is not None
        served.fork()
    assert pool._memory is None


def test_where_process_vm_writev_is_forbidden_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_reads, "_process_vm_writev", lambda *_: -1)
    with ServedExport(ZeroMQ(), (5 << 20) + 3) as served:
        served.fork()


# Slow readers.


def stall(client: "zmq.Socket[bytes]", served: ServedExport, count: int = WINDOW) -> None:
    """Request more than fits into the lease's buffers and the kernel's, read nothing, and wait until it has none."""
    for i in range(count):
        client.send(request(served.token, (served.region, 0, served.frame), number=i))
    deadline = time.monotonic() + SECONDS
    while served.export._buffers._free:
        assert time.monotonic() < deadline
        assert client.poll(1) in (0, zmq.POLLIN)


def slow_dealer(served: ServedExport, stack: ExitStack) -> "zmq.Socket[bytes]":
    context = stack.enter_context(zmq.Context())
    client = stack.enter_context(context.socket(zmq.DEALER))
    client.linger, client.rcvhwm, client.rcvbuf = 0, 1, 1 << 16
    client.connect(f"tcp://127.0.0.1:{served.port}")
    return client


def test_forks_that_never_read_hold_their_shares_and_nobody_else_up(pool: SlotPool) -> None:
    with ExitStack() as stack:
        for _ in range(5):
            served = stack.enter_context(ServedExport(ZeroMQ(), 4 << 20))
            stall(slow_dealer(served, stack), served)
        with ServedExport(ZeroMQ(), 4 << 20) as another:
            another.fork()


def test_a_lease_on_which_nobody_reads_ends_and_its_share_is_used_again(pool: SlotPool) -> None:
    for _ in range(3):
        with ExitStack() as stack:
            served = stack.enter_context(ServedExport(ZeroMQ(), 4 << 20))
            assert served.frame == SHARES[0][2]
            stall(slow_dealer(served, stack), served)
            assert served.export.close(soon())
    assert pool._memory is None


def test_answers_from_stable_memory_are_bounded_too() -> None:
    with ExitStack() as stack:
        served = stack.enter_context(ServedExport(ZeroMQ(), 4 << 20, stable=True))
        stall(slow_dealer(served, stack), served)
        with ServedExport(ZeroMQ(), 4 << 20, stable=True) as another:
            another.fork()


def test_more_leases_than_shares_are_unavailable_until_one_ends(pool: SlotPool) -> None:
    shares = [pool.open_share() for _ in range(MOST - 1)]
    with ServedExport(ZeroMQ()) as served:
        assert served.frame == SHARES[-1][2]
        with pytest.raises(TransportUnavailable, match="try again when one has ended"):
            ServedExport(ZeroMQ())
        served.fork()
    with ServedExport(ZeroMQ()) as served:
        served.fork()
    for share in shares:
        share.close()


@pytest.mark.parametrize("kind", range(len(SHARES)))
def test_a_share_of_any_size_brings_the_same_bytes(pool: SlotPool, kind: int) -> None:
    shares = [pool.open_share() for _ in range(sum(count for count, _, _ in SHARES[:kind]))]
    with ServedExport(ZeroMQ(), (5 << 20) + 3) as served:
        assert served.frame == SHARES[kind][2]
        served.fork()
    for share in shares:
        share.close()


def test_an_offer_of_answers_of_no_bytes_or_too_many_is_refused() -> None:
    for frame in (0, (2 << 20) + 1):
        with pytest.raises(Exception, match="makes no sense"):
            ZeroMQ().open(OFFER.pack(bytes(16), frame, 0), "127.0.0.1", [], [], unused_channel(), soon())


# Memory that goes.


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def mapped() -> Iterator[MappedMemory]:
    with MappedMemory(64) as memory:
        yield memory


@pytest.fixture(params=["process_vm_writev", "pwrite"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which host memory is read."""
    if request.param == "pwrite":
        monkeypatch.setattr(host_reads, "_process_vm_writev", lambda *_: -1)
    return str(request.param)


def test_memory_that_is_gone_is_answered_with_a_status_and_the_lease_goes_on(
    way: str, mapped: MappedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bytes(mapped.tensor[: 2 * PAGE].tolist())
    mapped.unmap(2)
    with (
        ServedExport(ZeroMQ(), 64 * PAGE, address=mapped.address) as served,
        dealer(served) as client,
    ):
        for _ in range(20):  # more often than there are buffers
            assert ask(client, served, (0, 2 * PAGE), (PAGE, 2 * PAGE)) == (MOVED, [])
        assert ask(client, served, (0, 2 * PAGE)) == (OK, [expected])
    assert [record.message for record in caplog.records if "cannot be read" in record.message][1:] == []


def test_a_fork_of_memory_that_is_gone_fails_and_what_is_done_is_whole(mapped: MappedMemory, stack: ExitStack) -> None:
    expected = mapped.tensor[: 8 * PAGE].clone()
    mapped.unmap(8)
    region = Region(1, mapped.address, mapped.nbytes, "cpu")
    ours = GuardedMemory("cpu", [mapped.nbytes], 4)
    at = stack.enter_context(started_port())
    export = ZeroMQ().export([region], Site("127.0.0.1", "127.0.0.1", port=at), {}, soon())
    thread = threading.Thread(target=export.serve, args=(unused_channel(),))
    thread.start()
    remote, channel = [RemoteRegion(1, mapped.nbytes, "cpu")], unused_channel(at.address.port)
    session = ZeroMQ(connections=1).open(export.offer, "127.0.0.1", remote, ours.regions, channel, soon())
    into = ours.regions[0].id
    done: list[int] = []
    try:
        with pytest.raises(TransferFailed, match="cannot read that memory any more"):
            session.pull(
                [Copy(0, 1, 0, into, 0, 8 * PAGE)] + [Copy(0, 1, 8 * PAGE, into, 8 * PAGE, PAGE)] * 100,
                soon(),
                done.append,
                threading.Event(),
            )
    finally:
        session.close(soon())
        assert export.close(soon())
        thread.join(SECONDS)
    assert set(done) <= {0}
    assert not done or ours.view(0, 0, 8 * PAGE).equal(expected)
    ours.expect(0, 0, ours.view(0, 0, 9 * PAGE))
    assert ours.first_difference() is None


def test_ranges_of_lent_and_copied_regions_in_one_request_are_all_copied(pool: SlotPool, stack: ExitStack) -> None:
    memory = GuardedMemory("cpu", [1000, 1000], 3)
    regions: Sequence[Region] = [evolve(one, stable=i == 0) for i, one in enumerate(memory.regions)]
    at = stack.enter_context(started_port())
    export = ZeroMQ().export(regions, Site("127.0.0.1", "127.0.0.1", port=at), {}, soon())
    thread = threading.Thread(target=export.serve, args=(unused_channel(),))
    thread.start()
    token, _, _ = OFFER.unpack(export.offer)
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.connect(str(at.address))
        client.send(request(token, (regions[0].id, 5, 10), (regions[1].id, 7, 20)))
        one, other = contents(3, [1000, 1000])
        assert recv_answer(client) == (1, OK, [bytes(one[5:15].tolist() + other[7:27].tolist())])
    assert export.close(soon())
    thread.join(SECONDS)
