"""A seed that ends a lease tells the fork to stop, and learns when it has closed its handles; the driver is a fake."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from tensorfork import Copy, PeerRefused, PeerUnreachable, Region, RemoteRegion, TransferFailed
from tensorfork.memory import cuda, streams
from tensorfork.testing.channel import QueueChannel
from tensorfork.transports.cuda_ipc import IpcExport, offer
from tensorfork.transports.cuda_ipc import session as session_module
from tensorfork.transports.cuda_ipc.offer import CPU_REQUEST, RELEASED, STOP
from tensorfork.transports.cuda_ipc.session import IpcSession
from tensorfork.transports.rate_limit import LEAST_PIECE

SOON = 20.0
SOURCE = torch.arange(64, dtype=torch.uint8)
ON_CPU = Region(0, SOURCE.data_ptr(), 64, "cpu", SOURCE)


def soon() -> float:
    return time.monotonic() + SOON


def channels() -> tuple[QueueChannel, QueueChannel]:
    """The seed's end and the fork's."""
    fork = QueueChannel(lambda _: None)
    seed = QueueChannel(fork.deliver)
    fork.connect(seed.deliver)
    return seed, fork


@contextmanager
def serving(export: IpcExport, channel: QueueChannel) -> Iterator[None]:
    serve = threading.Thread(target=export.serve, args=(channel,), daemon=True)
    serve.start()
    try:
        yield
    finally:
        channel.end()
        serve.join(SOON)
        assert not serve.is_alive()


@contextmanager
def closing(export: IpcExport, deadline: float, results: list[bool]) -> Iterator[None]:
    """Inside, the export is being closed on another thread, as a seed does."""
    thread = threading.Thread(target=lambda: results.append(export.close(deadline)), daemon=True)
    thread.start()
    yield
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_fork_that_still_reads_is_told_to_stop_and_waited_for() -> None:
    (seed, fork), closed = channels(), list[bool]()
    export = IpcExport([ON_CPU], b"")
    with serving(export, seed), closing(export, soon(), closed):
        assert fork.recv(soon()) == STOP
        assert closed == []
        fork.send(RELEASED, soon())
    assert closed == [True]


def test_a_fork_that_does_not_stop_costs_the_deadline_and_may_still_read() -> None:
    seed, fork = channels()
    export = IpcExport([ON_CPU], b"")
    with serving(export, seed):
        assert not export.close(time.monotonic() + 0.1)
        assert fork.recv(soon()) == STOP


def test_a_fork_that_has_ended_by_itself_is_told_nothing() -> None:
    seed, fork = channels()
    export = IpcExport([ON_CPU], b"")
    with serving(export, seed):
        fork.send(RELEASED, soon())
        assert export.close(soon())
    fork.end()
    with pytest.raises(PeerUnreachable, match="ended"):
        fork.recv(soon())


def test_a_fork_that_is_gone_is_not_waited_for() -> None:
    seed, _ = channels()
    export = IpcExport([ON_CPU], b"")
    with serving(export, seed):
        seed.end()
        begun = time.monotonic()
        assert not export.close(begun + 10 * SOON)
        assert time.monotonic() - begun < SOON


def test_no_cpu_tensor_is_served_once_the_lease_ends() -> None:
    (seed, fork), closed = channels(), list[bool]()
    export = IpcExport([ON_CPU], b"")
    with serving(export, seed), closing(export, soon(), closed):
        assert fork.recv(soon()) == STOP
        fork.send(CPU_REQUEST.pack(0, 0, 8), soon())
        assert fork.recv(soon()) == STOP
        fork.send(RELEASED, soon())


def test_a_fork_that_waits_for_a_cpu_tensor_stops() -> None:
    into = torch.zeros(64, dtype=torch.uint8)
    _, fork = channels()
    packed = offer.write_offer([ON_CPU], {})
    ours = [Region(5, into.data_ptr(), 64, "cpu", into)]
    session = IpcSession(packed, [RemoteRegion(0, 64, "cpu")], ours, fork, None)
    fork.deliver(STOP)
    with pytest.raises(TransferFailed, match="the seed ended the lease"):
        session.pull([Copy(0, 0, 0, 5, 0, 64)], soon(), lambda _: None, threading.Event())
    assert not into.any()
    session.close(soon())


class Stream:
    """A stream whose copies end when it is synchronised."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.synchronized = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.synchronized += 1


class NeverDone:
    """An event behind a copy that takes for ever."""

    def record(self, stream: Any) -> None:
        pass

    def query(self) -> bool:
        return False


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream()
    monkeypatch.setattr(streams, "acquire_stream", lambda device: made)
    monkeypatch.setattr(streams, "release_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Event", NeverDone)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(cuda, "current_context", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "relaxed_capture", nullcontext)
    monkeypatch.setattr(session_module, "copy_batch", lambda stream, copies: None)
    return made


def reading(fork: QueueChannel) -> IpcSession:
    """A session of a fork whose seed is in this process, so that there are no handles to open."""
    packed = offer.write_offer([Region(0, 1000, 64, "cuda:0")], {})
    return IpcSession(packed, [RemoteRegion(0, 64, "cuda:0")], [Region(5, 9000, 64, "cuda:0")], fork, None)


@pytest.mark.parametrize(("own", "seeds"), [(None, 1.0), (1.0, None), (1.0, 1e15), (1e15, 1.0)])
def test_a_fork_reads_no_faster_than_its_limit_and_the_seeds(
    own: float | None, seeds: float | None, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueued = list[int]()
    monkeypatch.setattr(session_module, "copy_batch", lambda stream, copies: enqueued.append(len(copies)))
    _, fork = channels()
    fork.rate_limit = seeds
    size = LEAST_PIECE  # a batch has one of them, and the second is due in days
    packed = offer.write_offer([Region(0, 1000, 4 * size, "cuda:0")], {})
    ours = [Region(5, 9000, 4 * size, "cuda:0")]
    session = IpcSession(packed, [RemoteRegion(0, 4 * size, "cuda:0")], ours, fork, own)
    copies = [Copy(0, 0, i * size, 5, i * size, size) for i in range(4)]
    for _ in range(2):  # one limit for all pulls of a session: strided tensors have one for each slab
        with pytest.raises(TransferFailed, match="deadline"):
            session.pull(copies, time.monotonic() + 0.2, lambda _: None, threading.Event())
        assert enqueued == [1]
    fork.rate_limit = None
    session.close(soon())


def test_a_fork_reads_cpu_tensors_no_faster_than_its_limit_either() -> None:
    into = torch.zeros(64, dtype=torch.uint8)
    _, fork = channels()
    fork.rate_limit = 0.001
    ours = [Region(5, into.data_ptr(), 64, "cpu", into)]
    packed = offer.write_offer([ON_CPU], {})
    session = IpcSession(packed, [RemoteRegion(0, 64, "cpu")], ours, fork, None)
    asked = list[bytes]()
    fork.connect(lambda message: (asked.append(message), fork.deliver(bytes(8)))[0])
    copies = [Copy(0, 0, i * 8, 5, i * 8, 8) for i in range(2)]
    with pytest.raises(TransferFailed, match="deadline"):
        session.pull(copies, time.monotonic() + 0.2, lambda _: None, threading.Event())
    assert asked == [CPU_REQUEST.pack(0, 0, 8)]
    session.close(soon())


def test_a_fork_that_reads_stops_and_its_copies_have_ended_before_the_seed_hears_of_it(stream: Stream) -> None:
    (seed, fork), closed = channels(), list[bool]()
    export = IpcExport([ON_CPU], b"")
    session = reading(fork)
    with serving(export, seed), closing(export, soon(), closed):
        with pytest.raises(TransferFailed, match="the seed ended the lease"):
            session.pull([Copy(0, 0, 0, 5, 0, 64)], soon(), lambda _: None, threading.Event())
        assert stream.synchronized == 1
        assert closed == []
        session.close(soon())
    assert closed == [True]


def test_a_seed_that_refuses_on_the_channel_ends_the_pull(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fork = channels()

    def refuse(deadline: float) -> bytes:
        raise PeerRefused("it is asleep")

    monkeypatch.setattr(fork, "recv", refuse)
    with pytest.raises(TransferFailed, match="it is asleep"):
        reading(fork).pull([Copy(0, 0, 0, 5, 0, 64)], soon(), lambda _: None, threading.Event())


def test_the_channel_is_looked_at_only_now_and_then(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fork = channels()
    looks, recv = list[float](), fork.recv
    monkeypatch.setattr(fork, "recv", lambda deadline: (looks.append(deadline), recv(deadline))[1])
    with pytest.raises(TransferFailed, match="by the deadline"):
        reading(fork).pull([Copy(0, 0, 0, 5, 0, 64)], time.monotonic() + 0.1, lambda _: None, threading.Event())
    assert 1 <= len(looks) <= 6
