"""How a session reads over NVLink: in batches, on threads, with handles opened beforehand. The engine is a fake."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import define, field

from tensorfork import Copy, LeaseEnded, PeerUnreachable, Region, RemoteRegion, TransferFailed, TransportUnavailable
from tensorfork.transports.transfer_engine import nvlink
from tensorfork.transports.transfer_engine.export import READS_DONE, STOP, OfferedRegion
from tensorfork.transports.transfer_engine.peer_lock import PeerLock
from tensorfork.transports.transfer_engine.session import EngineSession

SOON = 20.0
MIB = 1 << 20
COUNT = 12


@define
class Engine:
    """Records the batches that it is asked to read. `before` is called before each, with its number."""

    before: Callable[[int], object] = lambda number: None
    batches: list[list[tuple[int, int, int]]] = field(factory=list)
    lock: threading.Lock = field(factory=threading.Lock)
    begun: int = 0
    contacted: bool = True
    pulling: bool = False
    fabric: str = "nvlink"
    broken: bool = False

    def has_contacted(self, address: str) -> bool:
        return self.contacted

    def synchronize(self, devices: Sequence[str]) -> None:
        pass

    def read_batch(
        self,
        address: str,
        batch: Sequence[tuple[int, int, int]],
        device: str,
        deadline: float,
        stop: threading.Event | None = None,
    ) -> None:
        with self.lock:
            number, self.begun = self.begun, self.begun + 1
        self.before(number)
        with self.lock:
            self.batches.append(list(batch))

    @property
    def reads(self) -> list[tuple[int, int, int]]:
        """The reads of more than a byte: those of pulls."""
        return [one for batch in self.batches for one in batch if one[2] > 1]


@define
class Channel:
    sent: list[bytes] = field(factory=list)
    stop: bool = False
    rate_limit: float | None = None

    def send(self, message: bytes, deadline: float) -> None:
        self.sent.append(message)

    def recv(self, deadline: float) -> bytes:
        assert deadline <= time.monotonic(), "a fork does not wait for its seed"
        if self.stop:
            return STOP
        raise PeerUnreachable("nothing has come")

    def check(self) -> None:
        pass  # the fork is not cancelled


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(nvlink, "set_thread_device", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **(options | {"device": "cpu"})))


def opened(
    fake: Engine, channel: Channel | None = None, *, piece: int = MIB, rate: float | None = None
) -> EngineSession:
    remote = [RemoteRegion(i, MIB, "cuda:0") for i in range(COUNT)]
    offered = {i: OfferedRegion((100 + i) * MIB, ()) for i in range(COUNT)}
    ours = [Region(0, 1000 * MIB, COUNT * MIB, "cuda:1")]
    channel = channel or Channel()
    made = EngineSession(fake, "peer", offered, remote, ours, channel, piece=piece, rate=rate)  # type: ignore[arg-type]
    made.start(time.monotonic() + SOON)
    return made


COPIES = [Copy(0, i, 0, 0, i * MIB, MIB) for i in range(COUNT)]


def pull(
    made: EngineSession,
    done: Callable[[int], object] = lambda i: None,
    cancel: threading.Event | None = None,
    seconds: float = SOON,
) -> None:
    made.pull(COPIES, time.monotonic() + seconds, lambda i: (done(i), None)[1], cancel or threading.Event())


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tensorfork-read"]


@pytest.mark.parametrize(("contacted", "batches"), [(True, 4), (False, 6)])
def test_everything_is_read_once_in_a_few_batches(contacted: bool, batches: int) -> None:
    fake, done = Engine(contacted=contacted), list[int]()
    made = opened(fake, piece=MIB // 2)
    made.ready(time.monotonic() + SOON)
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    assert sorted(fake.reads) == [
        (1000 * MIB + i * MIB // 2, 100 * MIB + i * MIB // 2, MIB // 2) for i in range(2 * COUNT)
    ]
    assert sum(batch[0][2] > 1 for batch in fake.batches) == batches
    assert not readers()


@pytest.mark.parametrize("contacted", [True, False])
def test_two_batches_are_read_at_once_only_where_handles_are_to_be_opened(contacted: bool) -> None:
    under_way, most, both = list[int](), list[int](), threading.Barrier(2)

    def before(number: int) -> None:
        if not fake.pulling:
            return
        under_way.append(number)
        most.append(len(under_way))
        if not contacted and len(most) <= 2:
            both.wait(SOON)
        under_way.remove(number)

    fake, done = Engine(before, contacted=contacted), list[int]()
    made = opened(fake)
    made._handshake.wait_finished(time.monotonic() + SOON)  # type: ignore[union-attr]
    fake.pulling = True
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    assert max(most) == (1 if contacted else 2)


def test_handles_are_opened_before_the_pull_and_stay_open_for_the_next_lease() -> None:
    fake = Engine(contacted=False)
    made = opened(fake)
    made.ready(time.monotonic() + SOON)
    made._handshake.wait_finished(time.monotonic() + SOON)  # type: ignore[union-attr]
    assert [[source // MIB for _, source, _ in batch] for batch in fake.batches] == [[100], list(range(101, 112))]
    again = Engine()
    opened(again).ready(time.monotonic() + SOON)
    assert [len(batch) for batch in again.batches] == [1]


def test_a_pull_waits_for_the_first_handle_alone_and_stops_the_opening_of_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvlink, "HANDLES_PER_BATCH", 2)
    gate = threading.Event()
    fake, done = Engine(lambda number: number != 1 or gate.wait(SOON), contacted=False), list[int]()
    made = opened(fake)
    while fake.begun < 2:
        time.sleep(0.001)
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    gate.set()
    made.close(time.monotonic() + SOON)
    assert (
        sum(len(batch) for batch in fake.batches) == len(fake.reads) + 3
    )  # a byte of the first region, and of two more


@pytest.mark.parametrize("when", ["before it is ready", "afterwards"])
def test_a_handle_that_cannot_be_opened_is_found_before_the_pull_or_by_it(when: str) -> None:
    gate = threading.Event()

    def second_fails(number: int) -> None:
        if number == 1:
            assert gate.wait(SOON)
            raise TransferFailed("a handle that is none")

    fake, channel, done = Engine(second_fails, contacted=False), Channel(), list[int]()
    made = opened(fake, channel)
    if when == "afterwards":
        made.ready(time.monotonic() + SOON)
    gate.set()
    with pytest.raises(TransferFailed, match="a handle that is none"):
        made._handshake.wait_finished(time.monotonic() + SOON)  # type: ignore[union-attr]
    if when == "afterwards":
        pull(made, done.append)  # the fake does not fail again
        assert sorted(done) == list(range(COUNT))
    else:
        with pytest.raises(TransportUnavailable, match="a handle that is none"):
            made.ready(time.monotonic() + SOON)
    made.close(time.monotonic() + SOON)
    assert channel.sent == [READS_DONE]


def test_an_error_in_opening_is_the_reason_why_the_transport_is_unavailable() -> None:
    def fail(number: int) -> None:
        raise TransferFailed("nobody there")

    channel = Channel()
    made = opened(Engine(fail), channel)
    with pytest.raises(TransportUnavailable, match="nobody there"):
        made.ready(time.monotonic() + SOON)
    assert channel.sent == [READS_DONE]


def test_an_engine_that_hangs_while_it_opens_is_not_used_again() -> None:
    gate = threading.Event()
    fake, channel = Engine(lambda number: gate.wait(SOON)), Channel()
    made = opened(fake, channel)
    with pytest.raises(TransportUnavailable, match="did not answer"):
        made.ready(time.monotonic() + 0.05)
    assert fake.broken
    assert channel.sent == []  # it may still read
    gate.set()


def test_no_batch_begins_after_one_has_failed() -> None:
    failed = threading.Event()

    def third_fails(number: int) -> None:
        if number == 3:  # number 0 opens a handle
            failed.set()
            raise TransferFailed("the process died")
        if number > 3:
            assert failed.wait(SOON)

    fake, done = Engine(third_fails), list[int]()
    made = opened(fake)
    with pytest.raises(TransferFailed, match="the process died"):
        pull(made, done.append)
    assert fake.begun <= 5  # the other thread was reading a batch, or about to
    assert {(1000 + i) * MIB for i in done} <= {into for into, _, _ in fake.reads}
    assert not readers()


def test_a_pull_that_is_cancelled_from_done_begins_no_further_batch() -> None:
    cancel, held = threading.Event(), threading.Event()
    fake = Engine(lambda number: number < 3 or held.wait(SOON))
    made = opened(fake)

    def done(i: int) -> None:
        cancel.set()
        held.set()

    with pytest.raises(TransferFailed, match="cancelled"):
        pull(made, done, cancel)
    assert len(fake.batches) == fake.begun <= 5  # what had begun has ended
    assert not readers()


def test_a_batch_that_outlasts_the_deadline_is_waited_for() -> None:
    deadline, ended = time.monotonic() + 0.1, list[bool]()

    def slow(number: int) -> None:
        if number == 2:
            while time.monotonic() < deadline + 0.1:
                time.sleep(0.001)
            ended.append(True)

    made = opened(Engine(slow))
    with pytest.raises(TransferFailed, match="deadline"):
        pull(made, seconds=deadline - time.monotonic())
    assert ended, "something is written after the pull has failed"
    assert not readers()


def test_an_error_raised_by_done_ends_the_pull_and_its_threads() -> None:
    def done(i: int) -> None:
        raise KeyboardInterrupt

    fake = Engine()
    with pytest.raises(KeyboardInterrupt):
        pull(opened(fake), done)
    assert not readers()


def test_with_a_rate_reads_are_made_one_at_a_time_and_a_cancel_does_not_wait_for_the_next() -> None:
    fake, cancel = Engine(), threading.Event()
    made = opened(fake, rate=MIB / 1000)  # the second would be due in a quarter of an hour
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="cancelled"):
        pull(made, lambda i: cancel.set(), cancel)
    assert time.monotonic() - started < SOON
    assert len(fake.reads) == 1
    assert not readers()


def test_a_fork_obeys_the_seeds_limit_and_hears_of_a_larger_one_while_it_waits() -> None:
    fake, channel, arrived = Engine(), Channel(rate_limit=MIB / 1000), list[int]()
    made = opened(fake, channel)

    def done(i: int) -> None:
        arrived.append(i)
        assert len(fake.reads) == 1 or channel.rate_limit == 1e15
        channel.rate_limit = 1e15  # the second would have been due in a quarter of an hour

    pull(made, done)
    assert sorted(arrived) == list(range(COUNT))
    assert len(fake.batches) == len(fake.reads) + 1, "one read at a time, behind the first contact"


@pytest.mark.parametrize(("own", "seeds"), [(MIB / 1000, 1e15), (1e15, MIB / 1000)])
def test_of_the_forks_limit_and_the_seeds_the_smaller_one_counts(own: float, seeds: float) -> None:
    fake, cancel = Engine(), threading.Event()
    with pytest.raises(TransferFailed, match="cancelled"):
        pull(opened(fake, Channel(rate_limit=seeds), rate=own), lambda i: cancel.set(), cancel)
    assert len(fake.reads) == 1


def test_an_interrupt_while_a_thread_starts_leaves_no_thread_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, start = Engine(), threading.Thread.start
    made = opened(fake)
    made.ready(time.monotonic() + SOON)
    before = len(fake.batches)
    fake.before = lambda number: released.wait(SOON)
    released = threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "tensorfork-read":
            threading.Timer(0.05, released.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull(made)
    assert before <= len(fake.batches) == fake.begun <= before + 1  # the batch that had begun has ended
    assert not readers()


def test_after_a_second_interrupt_the_threads_are_still_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released, join, interrupts = threading.Event(), threading.Thread.join, list[int]()
    fake = Engine(lambda number: number < 2 or released.wait(SOON))
    made = opened(fake)

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "tensorfork-read" and len(interrupts) < 2:
            interrupts.append(1)
            raise KeyboardInterrupt
        released.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)

    def done(i: int) -> None:
        raise ValueError("of the caller's")

    with pytest.raises(KeyboardInterrupt):
        pull(made, done)
    assert len(interrupts) == 2
    assert not readers()


def test_after_any_error_in_opening_the_session_closes_and_sends_reads_done() -> None:
    def out_of_memory(number: int) -> None:
        raise RuntimeError("CUDA out of memory")

    channel = Channel()
    made = opened(Engine(out_of_memory), channel)
    made.close(time.monotonic() + SOON)
    made.close(time.monotonic() + SOON)
    assert channel.sent == [READS_DONE]


def test_closing_does_not_wait_long_for_an_engine_that_hangs() -> None:
    gate = threading.Event()
    fake, channel = Engine(lambda number: gate.wait(4 * SOON)), Channel()
    made = opened(fake, channel)
    began = time.monotonic()
    made.close(time.monotonic() + 4 * SOON)
    gate.set()
    assert time.monotonic() - began < SOON
    assert fake.broken
    assert channel.sent == []


def test_a_session_closes_at_once_while_another_peer_keeps_the_engine_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread only waits for the lock, so the engine is not broken."""
    lock, waiting = PeerLock(), threading.Event()
    fake, channel = Engine(contacted=False), Channel()

    def read_batch(*args: Any) -> None:
        fake.begun += 1
        if fake.begun == 2:
            waiting.set()
            with lock.acquire(time.monotonic() + 4 * SOON, exclusive=False, stop=args[-1]):
                raise AssertionError

    monkeypatch.setattr(Engine, "read_batch", lambda self, *args: read_batch(*args))
    with lock.acquire(time.monotonic() + SOON, exclusive=True):
        made = opened(fake, channel)
        made.ready(time.monotonic() + SOON)
        assert waiting.wait(SOON)
        made.close(time.monotonic() + SOON)
    assert not fake.broken
    assert channel.sent == [READS_DONE]


def test_a_pull_ends_when_the_seed_ends_the_lease_and_the_fork_says_so_once_nothing_is_read() -> None:
    channel, done = Channel(), list[int]()
    fake = Engine(before=lambda number: setattr(channel, "stop", number > 0))
    made = opened(fake, channel, piece=MIB, rate=1e6)
    with pytest.raises(TransferFailed, match="the seed ended the lease"):
        pull(made, done.append)
    assert len(done) < COUNT
    assert not readers()
    assert channel.sent == []
    made.close(time.monotonic() + SOON)
    assert channel.sent == [READS_DONE]


def test_a_fork_that_is_cancelled_does_not_wait_for_an_engine_that_does_not_answer() -> None:
    class Cancelled(Channel):
        def check(self) -> None:
            raise LeaseEnded("the fork was cancelled")

    gate = threading.Event()
    fake = Engine(lambda number: gate.wait(SOON), contacted=False)
    made = opened(fake, Cancelled())
    with pytest.raises(TransportUnavailable, match="cancelled"):
        made.ready(time.monotonic() + SOON)
    assert fake.broken
    gate.set()
