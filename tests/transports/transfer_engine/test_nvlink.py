"""How a session reads over NVLink: in batches on a thread, its handles opened meanwhile; the engine is a fake."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attrs import define, field

from tensorfork import Copy, Region, RemoteRegion, TransferFailed, TransportUnavailable
from tensorfork.transports.transfer_engine import engine, session
from tensorfork.transports.transfer_engine.export import QUIET, OfferedRegion
from tensorfork.transports.transfer_engine.peer_lock import PeerLock
from tensorfork.transports.transfer_engine.session import EngineSession

SOON = 20.0
MIB = 1 << 20
COUNT = 12


@define
class Engine:
    """Says what it was asked to read. `before` is called before each batch, with its number."""

    before: Callable[[int], object] = lambda number: None
    batches: list[list[tuple[int, int, int]]] = field(factory=list)
    lock: threading.Lock = field(factory=threading.Lock)
    begun: int = 0
    known: bool = True
    pulling: bool = False
    fabric: str = "nvlink"
    broken: bool = False

    def meet(self, work: Callable[[Callable[[], None]], Any]) -> engine.Handshake:
        return engine.Handshake(self, work)  # type: ignore[arg-type]

    def knows(self, address: str) -> bool:
        return self.known

    def settle(self, devices: Sequence[str]) -> None:
        pass

    def read_all(
        self,
        address: str,
        stretches: Sequence[tuple[int, int, int]],
        device: str,
        deadline: float,
        enough: threading.Event | None = None,
    ) -> None:
        with self.lock:
            number, self.begun = self.begun, self.begun + 1
        self.before(number)
        with self.lock:
            self.batches.append(list(stretches))

    @property
    def reads(self) -> list[tuple[int, int, int]]:
        """Those of more than a byte."""
        return [one for batch in self.batches for one in batch if one[2] > 1]


@define
class Channel:
    said: list[bytes] = field(factory=list)

    def send(self, message: bytes, deadline: float) -> None:
        self.said.append(message)

    def recv(self, deadline: float) -> bytes:
        raise AssertionError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(session, "_on_our_device", lambda device: None)
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


@pytest.mark.parametrize(("known", "batches"), [(True, 4), (False, 6)])
def test_everything_is_read_once_in_a_few_batches(known: bool, batches: int) -> None:
    fake, done = Engine(known=known), list[int]()
    made = opened(fake, piece=MIB // 2)
    made.ready(time.monotonic() + SOON)
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    assert sorted(fake.reads) == [
        (1000 * MIB + i * MIB // 2, 100 * MIB + i * MIB // 2, MIB // 2) for i in range(2 * COUNT)
    ]
    assert sum(batch[0][2] > 1 for batch in fake.batches) == batches
    assert not readers()


@pytest.mark.parametrize("known", [True, False])
def test_one_batch_is_read_while_another_is_where_handles_are_to_be_opened(known: bool) -> None:
    under_way, most, both = list[int](), list[int](), threading.Barrier(2)

    def before(number: int) -> None:
        if not fake.pulling:
            return
        under_way.append(number)
        most.append(len(under_way))
        if not known and len(most) <= 2:
            both.wait(SOON)
        under_way.remove(number)

    fake, done = Engine(before, known=known), list[int]()
    made = opened(fake)
    made._meeting.end(time.monotonic() + SOON)  # type: ignore[union-attr]
    fake.pulling = True
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    assert max(most) == (1 if known else 2)


def test_handles_are_opened_while_plans_are_drawn_up_and_are_there_at_the_next_lease() -> None:
    fake = Engine(known=False)
    made = opened(fake)
    made.ready(time.monotonic() + SOON)
    made._meeting.end(time.monotonic() + SOON)  # type: ignore[union-attr]
    assert [[source // MIB for _, source, _ in batch] for batch in fake.batches] == [[100], list(range(101, 112))]
    again = Engine()
    opened(again).ready(time.monotonic() + SOON)
    assert [len(batch) for batch in again.batches] == [1]


def test_a_pull_waits_for_the_first_handle_alone_and_stops_whoever_opens_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "HANDLES", 2)
    gate = threading.Event()
    fake, done = Engine(lambda number: number != 1 or gate.wait(SOON), known=False), list[int]()
    made = opened(fake)
    while fake.begun < 2:
        time.sleep(0.001)
    pull(made, done.append)
    assert sorted(done) == list(range(COUNT))
    gate.set()
    made.close(time.monotonic() + SOON)
    assert sum(len(batch) for batch in fake.batches) == len(fake.reads) + 3  # bytes of the first, and of two more


@pytest.mark.parametrize("when", ["before it is ready", "afterwards"])
def test_a_handle_that_cannot_be_opened_is_found_before_the_pull_or_by_it(when: str) -> None:
    gate = threading.Event()

    def second_fails(number: int) -> None:
        if number == 1:
            assert gate.wait(SOON)
            raise TransferFailed("a handle that is none")

    fake, channel, done = Engine(second_fails, known=False), Channel(), list[int]()
    made = opened(fake, channel)
    if when == "afterwards":
        made.ready(time.monotonic() + SOON)
    gate.set()
    with pytest.raises(TransferFailed, match="a handle that is none"):
        made._meeting.end(time.monotonic() + SOON)  # type: ignore[union-attr]
    if when == "afterwards":
        pull(made, done.append)  # the fake has it by then
        assert sorted(done) == list(range(COUNT))
    else:
        with pytest.raises(TransportUnavailable, match="a handle that is none"):
            made.ready(time.monotonic() + SOON)
    made.close(time.monotonic() + SOON)
    assert channel.said == [QUIET]


def test_what_opening_fails_with_is_why_this_transport_does_not_work_here() -> None:
    def fail(number: int) -> None:
        raise TransferFailed("nobody there")

    channel = Channel()
    made = opened(Engine(fail), channel)
    with pytest.raises(TransportUnavailable, match="nobody there"):
        made.ready(time.monotonic() + SOON)
    assert channel.said == [QUIET]


def test_an_engine_that_hangs_while_it_opens_is_not_used_again() -> None:
    gate = threading.Event()
    fake, channel = Engine(lambda number: gate.wait(SOON)), Channel()
    made = opened(fake, channel)
    with pytest.raises(TransportUnavailable, match="did not answer"):
        made.ready(time.monotonic() + 0.05)
    assert fake.broken
    assert channel.said == []  # it may read yet
    gate.set()


def test_nothing_is_begun_behind_a_batch_that_failed() -> None:
    failed = threading.Event()

    def third_fails(number: int) -> None:
        if number == 3:  # the first opens a handle
            failed.set()
            raise TransferFailed("the process died")
        if number > 3:
            assert failed.wait(SOON)

    fake, done = Engine(third_fails), list[int]()
    made = opened(fake)
    with pytest.raises(TransferFailed, match="the process died"):
        pull(made, done.append)
    assert fake.begun <= 5  # beside the one that failed, another was under way, or about to begin
    assert {(1000 + i) * MIB for i in done} <= {into for into, _, _ in fake.reads}
    assert not readers()


def test_a_pull_that_is_cancelled_from_done_begins_nothing_more() -> None:
    cancel, held = threading.Event(), threading.Event()
    fake = Engine(lambda number: number < 3 or held.wait(SOON))
    made = opened(fake)

    def done(i: int) -> None:
        cancel.set()
        held.set()

    with pytest.raises(TransferFailed, match="cancelled"):
        pull(made, done, cancel)
    assert len(fake.batches) == fake.begun <= 5  # what was under way has ended
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


def test_what_done_raises_ends_the_pull_and_the_thread() -> None:
    def done(i: int) -> None:
        raise KeyboardInterrupt

    fake = Engine()
    with pytest.raises(KeyboardInterrupt):
        pull(opened(fake), done)
    assert not readers()


def test_with_a_rate_reads_go_one_at_a_time_and_a_cancel_does_not_wait_for_the_next() -> None:
    fake, cancel = Engine(), threading.Event()
    made = opened(fake, rate=MIB / 1000)  # the second would be due in a quarter of an hour
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="cancelled"):
        pull(made, lambda i: cancel.set(), cancel)
    assert time.monotonic() - started < SOON
    assert len(fake.reads) == 1
    assert not readers()


def test_an_interrupt_while_the_thread_starts_leaves_nobody_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert before <= len(fake.batches) == fake.begun <= before + 1  # the one that had begun has ended
    assert not readers()


def test_a_second_interrupt_waits_for_what_is_under_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_whatever_opening_fails_with_a_session_closes_and_says_so() -> None:
    def out_of_memory(number: int) -> None:
        raise RuntimeError("CUDA out of memory")

    channel = Channel()
    made = opened(Engine(out_of_memory), channel)
    made.close(time.monotonic() + SOON)
    made.close(time.monotonic() + SOON)
    assert channel.said == [QUIET]


def test_closing_waits_for_an_engine_that_hangs_for_a_moment_only() -> None:
    gate = threading.Event()
    fake, channel = Engine(lambda number: gate.wait(4 * SOON)), Channel()
    made = opened(fake, channel)
    began = time.monotonic()
    made.close(time.monotonic() + 4 * SOON)
    gate.set()
    assert time.monotonic() - began < SOON
    assert fake.broken
    assert channel.said == []


@pytest.mark.parametrize("when", ["while it waits", "before it begins"])
def test_a_read_that_waits_for_its_turn_is_given_up_when_there_is_enough(when: str) -> None:
    waiting = engine.Engine.__new__(engine.Engine)
    waiting._forks, waiting._turn, waiting._known = engine._forks, PeerLock(), set()
    enough = threading.Event()
    enough.set()
    other = waiting._turn.take(time.monotonic() + SOON, alone=True) if when == "while it waits" else nullcontext()
    with other, pytest.raises(TransferFailed):
        waiting.read_all("peer", [(0, 0, 1)], "cpu", time.monotonic() + 4 * SOON, enough)
    with waiting._turn.take(time.monotonic() + SOON, alone=True):
        pass  # nobody is left inside


def test_who_knows_the_peer_reads_beside_others_and_who_does_not_is_alone() -> None:
    turn = PeerLock()

    def refused(*, alone: bool) -> None:
        with pytest.raises(TransferFailed, match="another peer"), turn.take(time.monotonic() + 0.05, alone=alone):
            pass

    with turn.take(time.monotonic() + SOON, alone=False), turn.take(time.monotonic() + SOON, alone=False):
        refused(alone=True)
    with turn.take(time.monotonic() + SOON, alone=True):
        refused(alone=False)
        refused(alone=True)
    with turn.take(time.monotonic() + SOON, alone=False):
        pass


@pytest.mark.parametrize("alone", [False, True])
def test_an_interrupt_while_one_waits_for_a_turn_leaves_the_turn_free(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = PeerLock()

    def interrupted(seconds: float) -> bool:
        raise KeyboardInterrupt

    with turn.take(time.monotonic() + SOON, alone=True), monkeypatch.context() as patch:
        patch.setattr(turn._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), turn.take(time.monotonic() + SOON, alone=alone):
            pass
    for again in (True, False):
        with turn.take(time.monotonic() + SOON, alone=again):
            pass


def test_a_session_closes_at_once_while_another_peer_keeps_the_engine_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had begun only waits for its turn, and the engine is as sound as before."""
    turn, waiting = PeerLock(), threading.Event()
    fake, channel = Engine(known=False), Channel()

    def read_all(*args: Any) -> None:
        fake.begun += 1
        if fake.begun == 2:
            waiting.set()
            with turn.take(time.monotonic() + 4 * SOON, alone=False, enough=args[-1]):
                raise AssertionError

    monkeypatch.setattr(Engine, "read_all", lambda self, *args: read_all(*args))
    with turn.take(time.monotonic() + SOON, alone=True):
        made = opened(fake, channel)
        made.ready(time.monotonic() + SOON)
        assert waiting.wait(SOON)
        made.close(time.monotonic() + SOON)
    assert not fake.broken
    assert channel.said == [QUIET]


def test_who_wants_to_be_alone_is_not_kept_out_by_those_who_come_later() -> None:
    turn, order = PeerLock(), list[str]()

    def alone() -> None:
        with turn.take(time.monotonic() + SOON, alone=True):
            order.append("alone")

    def beside() -> None:
        with turn.take(time.monotonic() + SOON, alone=False):
            order.append("beside")

    first, second = threading.Thread(target=alone), threading.Thread(target=beside)
    with turn.take(time.monotonic() + SOON, alone=False):
        first.start()
        while not turn._queue:
            time.sleep(0.001)
        second.start()
        second.join(0.1)
        assert not order
    first.join(SOON)
    second.join(SOON)
    assert order == ["alone", "beside"]
