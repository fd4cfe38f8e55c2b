"""When communicators are created and destroyed, and what a fork waits for; nothing here needs a GPU."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from gloo_leases import BATCH, DIRECT, SECONDS, batch_copies, export, opened, served

from tensorfork import TransferFailed
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group import communicator_gate, nccl
from tensorfork.transports.process_group.communicator_gate import CommunicatorGate
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import FORK

MOMENT = 0.1
"""Seconds after which something that has not happened is taken to wait."""


class Lease:
    """Stands for a lease."""


class Creation:
    """Creates a communicator, on a thread of its own; it is being created until `created` is set."""

    def __init__(self, gate: CommunicatorGate, lease: Lease, seconds: float = SECONDS) -> None:
        self._gate, self._lease, self._deadline = gate, lease, time.monotonic() + seconds
        self.started, self.created, self.error = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._gate.creating(self._lease, self._deadline):
                self.started.set()
                self.created.wait(SECONDS)
        except TransferFailed as error:
            self.error: TransferFailed | None = error


@contextmanager
def creating(gate: CommunicatorGate, lease: Lease, seconds: float = SECONDS) -> Iterator[Creation]:
    creation = Creation(gate, lease, seconds)
    try:
        yield creation
    finally:
        creation.created.set()
        creation.thread.join(SECONDS)
        assert not creation.thread.is_alive()


def test_leases_take_turns_and_the_groups_of_one_lease_are_created_together() -> None:
    gate, one, other = CommunicatorGate(), Lease(), Lease()
    with creating(gate, one) as first, creating(gate, one) as second:
        assert first.started.wait(SECONDS)
        assert second.started.wait(communicator_gate.LEASE_WAIT / 2)
        with creating(gate, other) as third:
            first.created.set()
            assert not third.started.wait(MOMENT)
            second.created.set()
            assert third.started.wait(SECONDS)


def test_a_lease_that_does_not_finish_delays_others_for_a_limited_time_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(communicator_gate, "LEASE_WAIT", 1.0)
    gate = CommunicatorGate()
    with creating(gate, Lease()) as stuck:
        assert stuck.started.wait(SECONDS)
        with creating(gate, Lease()) as second:
            assert not second.started.wait(MOMENT)
            assert second.started.wait(SECONDS)
        with creating(gate, Lease()) as third:
            assert third.started.wait(0.8), "it waited for the same one again"


def test_creation_waits_for_an_abort_and_an_abort_for_nothing() -> None:
    gate = CommunicatorGate()
    with creating(gate, Lease()) as first, ExitStack() as abort:
        assert first.started.wait(SECONDS)
        abort.enter_context(gate.aborting())
        first.created.set()
        with creating(gate, Lease()) as second:
            assert not second.started.wait(MOMENT)
            abort.close()
            assert second.started.wait(SECONDS)
    with gate.aborting(), creating(gate, Lease(), MOMENT) as late:
        late.thread.join(SECONDS)
        assert late.error is not None
        assert not late.started.is_set()


def test_a_group_is_destroyed_while_none_is_created_and_none_is_created_meanwhile() -> None:
    gate, aborting, aborted = CommunicatorGate(), threading.Event(), threading.Event()

    def abort(group: object) -> None:
        aborting.set()
        aborted.wait(SECONDS)

    group = Lease()
    reference = weakref.ref(group)
    references: list[object] = [group, "buckets"]
    del group
    with creating(gate, Lease()) as first:
        assert first.started.wait(SECONDS)
        gate.destroy(references, abort)
        assert not aborting.wait(MOMENT)
        first.created.set()
        assert aborting.wait(SECONDS)
    with creating(gate, Lease()) as second:
        assert not second.started.wait(MOMENT)
        assert len(references) == 2
        aborted.set()
        assert second.started.wait(SECONDS)
        assert not references
    gate.wait_until_idle()
    gc.collect()
    assert reference() is None


# What a fork waits for.


class Group:
    """Takes its time to abort, as NCCL does."""

    def __init__(self) -> None:
        self.aborting, self.go_on = threading.Event(), threading.Event()

    def abort(self) -> None:
        self.aborting.set()
        assert self.go_on.wait(SECONDS)


def nccl_group(group: Group | None) -> NcclGroup:
    pair_group = object.__new__(NcclGroup)
    pair_group.rank, pair_group.aborted, pair_group._group, pair_group._buckets = FORK, False, group, [torch.zeros(10)]
    return pair_group


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> CommunicatorGate:
    """A gate for this test alone."""
    gate = CommunicatorGate()
    monkeypatch.setattr(nccl, "communicator_gate", gate)
    return gate


def test_an_idle_group_is_aborted_after_close_returns_and_its_buckets_are_kept_until_then(
    gate: CommunicatorGate,
) -> None:
    group = Group()
    pair_group = nccl_group(group)
    bucket, torch_group = weakref.ref(pair_group._buckets[0]), weakref.ref(group)
    pair_group.close(idle=True)
    assert pair_group.aborted
    assert group.aborting.wait(SECONDS)
    pair_group.abort()  # and this neither waits nor aborts it again
    pair_group.close()
    gc.collect()
    assert bucket() is not None
    group.go_on.set()
    del group
    gate.wait_until_idle()
    assert bucket() is None
    assert torch_group() is None


def test_a_group_that_may_be_busy_is_aborted_before_close_returns(gate: CommunicatorGate) -> None:
    group = Group()
    pair_group = nccl_group(group)
    closed = threading.Event()

    def close() -> None:
        pair_group.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert group.aborting.wait(SECONDS)
    assert not closed.wait(MOMENT)
    group.go_on.set()
    assert closed.wait(SECONDS)
    gate.wait_until_idle()


def test_a_session_waits_for_its_groups_to_be_aborted_only_if_something_may_be_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle: list[bool] = []
    close = GlooGroup.close

    def record(group: GlooGroup, is_idle: bool = False) -> None:
        if group.rank == FORK:
            idle.append(is_idle)
        close(group, is_idle)

    monkeypatch.setattr(GlooGroup, "close", record)
    memory, into = GuardedMemory("cpu", [6 * BATCH], 1), GuardedMemory("cpu", [6 * BATCH], 2)
    copies = batch_copies(memory, into, 6)

    def lease(*pulls: float) -> None:
        made = export(memory, **DIRECT)
        with served(made) as (channel, _), opened(memory, into, channel, made.offer, **DIRECT) as session:
            for seconds in pulls:
                session.pull(copies, time.monotonic() + seconds, lambda _: None, threading.Event())

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    lease()
    lease(SECONDS)
    lease(SECONDS, SECONDS)
    assert idle == [True] * 3
    made = export(memory, **DIRECT)
    with (
        served(made) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
        pytest.raises(KeyboardInterrupt),
    ):
        session.pull(copies, time.monotonic() + SECONDS, interrupt, threading.Event())
    assert idle == [True] * 3 + [False]
