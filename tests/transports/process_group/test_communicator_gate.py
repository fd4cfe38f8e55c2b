"""When communicators are made and taken down, and what a fork waits for; nothing here needs a GPU."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from gloo_leases import DIRECT, PARCEL, SECONDS, export, opened, served, stripes

from tensorfork import TransferFailed
from tensorfork.testing.memory import Memory
from tensorfork.transports.process_group import communicator_gate as the_module
from tensorfork.transports.process_group import nccl
from tensorfork.transports.process_group.communicator_gate import CommunicatorGate
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import FORK

MOMENT = 0.1
"""Seconds in which what must wait would have come."""


class Lease:
    """Stands for one."""


class Maker:
    """Makes a communicator, on a thread of its own, until it is told that it is made."""

    def __init__(self, nursery: CommunicatorGate, lease: Lease, seconds: float = SECONDS) -> None:
        self._nursery, self._lease, self._until = nursery, lease, time.monotonic() + seconds
        self.began, self.made, self.error = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._nursery.making(self._lease, self._until):
                self.began.set()
                self.made.wait(SECONDS)
        except TransferFailed as error:
            self.error: TransferFailed | None = error


@contextmanager
def making(nursery: CommunicatorGate, lease: Lease, seconds: float = SECONDS) -> Iterator[Maker]:
    maker = Maker(nursery, lease, seconds)
    try:
        yield maker
    finally:
        maker.made.set()
        maker.thread.join(SECONDS)
        assert not maker.thread.is_alive()


def test_leases_take_turns_and_the_lanes_of_one_are_made_together() -> None:
    nursery, one, other = CommunicatorGate(), Lease(), Lease()
    with making(nursery, one) as first, making(nursery, one) as second:
        assert first.began.wait(SECONDS)
        assert second.began.wait(the_module.LEASE_WAIT / 2)
        with making(nursery, other) as third:
            first.made.set()
            assert not third.began.wait(MOMENT)
            second.made.set()
            assert third.began.wait(SECONDS)


def test_a_turn_that_does_not_end_stops_others_for_a_while_only_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_module, "LEASE_WAIT", 1.0)
    nursery = CommunicatorGate()
    with making(nursery, Lease()) as stuck:
        assert stuck.began.wait(SECONDS)
        with making(nursery, Lease()) as second:
            assert not second.began.wait(MOMENT)
            assert second.began.wait(SECONDS)
        with making(nursery, Lease()) as third:
            assert third.began.wait(0.8), "it waited for the same one again"


def test_a_making_waits_for_an_abort_and_an_abort_for_nothing() -> None:
    nursery = CommunicatorGate()
    with making(nursery, Lease()) as first, ExitStack() as abort:
        assert first.began.wait(SECONDS)
        abort.enter_context(nursery.aborting())
        first.made.set()
        with making(nursery, Lease()) as second:
            assert not second.began.wait(MOMENT)
            abort.close()
            assert second.began.wait(SECONDS)
    with nursery.aborting(), making(nursery, Lease(), MOMENT) as late:
        late.thread.join(SECONDS)
        assert late.error is not None
        assert not late.began.is_set()


def test_a_group_is_taken_down_when_nobody_makes_one_and_nobody_makes_one_meanwhile() -> None:
    nursery, going, ended = CommunicatorGate(), threading.Event(), threading.Event()

    def stop(group: object) -> None:
        going.set()
        ended.wait(SECONDS)

    group = Lease()
    gone = weakref.ref(group)
    held: list[object] = [group, "buckets"]
    del group
    with making(nursery, Lease()) as first:
        assert first.began.wait(SECONDS)
        nursery.end(held, stop)
        assert not going.wait(MOMENT)
        first.made.set()
        assert going.wait(SECONDS)
    with making(nursery, Lease()) as second:
        assert not second.began.wait(MOMENT)
        assert len(held) == 2
        ended.set()
        assert second.began.wait(SECONDS)
        assert not held
    nursery.settle()
    gc.collect()
    assert gone() is None


# What a fork waits for.


class Group:
    """Takes its time to abort, as NCCL does."""

    def __init__(self) -> None:
        self.aborting, self.go_on = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.aborting.set()
        assert self.go_on.wait(SECONDS)


def lane_of(group: Group | None) -> NcclGroup:
    lane = object.__new__(NcclGroup)
    lane.rank, lane.aborted, lane._group, lane._slots = FORK, False, group, [torch.zeros(10)]
    return lane


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> CommunicatorGate:
    """One for this test alone."""
    made = CommunicatorGate()
    monkeypatch.setattr(nccl, "communicator_gate", made)
    return made


def test_an_idle_lane_is_aborted_behind_its_forks_back_and_its_buckets_are_kept_until_then(
    nursery: CommunicatorGate,
) -> None:
    group = Group()
    lane = lane_of(group)
    bucket, kept = weakref.ref(lane._slots[0]), weakref.ref(group)
    lane.close(idle=True)
    assert lane.aborted
    assert group.aborting.wait(SECONDS)
    lane.abort()  # and this neither waits nor aborts it again
    lane.close()
    gc.collect()
    assert bucket() is not None
    group.go_on.set()
    del group
    nursery.settle()
    assert bucket() is None
    assert kept() is None


def test_a_lane_that_may_be_at_work_is_aborted_before_it_is_closed(nursery: CommunicatorGate) -> None:
    group = Group()
    lane = lane_of(group)
    closed = threading.Event()

    def close() -> None:
        lane.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert group.aborting.wait(SECONDS)
    assert not closed.wait(MOMENT)
    group.go_on.set()
    assert closed.wait(SECONDS)
    nursery.settle()


def test_a_session_waits_for_its_lanes_to_be_aborted_only_where_something_may_be_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle: list[bool] = []
    close = GlooGroup.close

    def note(lane: GlooGroup, nothing: bool = False) -> None:
        if lane.rank == FORK:
            idle.append(nothing)
        close(lane, nothing)

    monkeypatch.setattr(GlooGroup, "close", note)
    memory, into = Memory("cpu", [6 * PARCEL], 1), Memory("cpu", [6 * PARCEL], 2)
    copies = stripes(memory, into, 6)

    def lease(*pulls: float) -> None:
        made = export(memory, **DIRECT)
        with served(made) as (speaker, _), opened(memory, into, speaker, made.offer, **DIRECT) as session:
            for seconds in pulls:
                session.pull(copies, time.monotonic() + seconds, lambda _: None, threading.Event())

    def stumble(_: int) -> None:
        raise KeyboardInterrupt

    lease()
    lease(SECONDS)
    lease(SECONDS, SECONDS)
    assert idle == [True] * 3
    made = export(memory, **DIRECT)
    with (
        served(made) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
        pytest.raises(KeyboardInterrupt),
    ):
        session.pull(copies, time.monotonic() + SECONDS, stumble, threading.Event())
    assert idle == [True] * 3 + [False]
