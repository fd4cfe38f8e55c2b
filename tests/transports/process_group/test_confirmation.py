"""A copy is done when its bytes have arrived and the seed has confirmed that they left whole; over gloo."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from gloo_leases import BATCH, DIRECT, SECONDS, batch_copies, export, opened, served

from tensorfork import TransferFailed
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import SEED
from tensorfork.transports.process_group.sender import REPORT_INTERVAL


def test_a_copy_that_arrived_is_not_done_before_the_seed_has_confirmed_it() -> None:
    memory, into = GuardedMemory("cpu", [6 * BATCH], 1), GuardedMemory("cpu", [6 * BATCH], 2)
    made, done = export(memory, **DIRECT), list[int]()
    with (
        served(made, lambda message: None if message[0] == "sent" else message) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="deadline"),
    ):
        session.pull(batch_copies(memory, into, 6), time.monotonic() + 1.0, done.append, threading.Event())
    assert into.view(0, 0, 6 * BATCH).equal(memory.view(0, 0, 6 * BATCH)), "this test needs all of it to arrive"
    assert not done


def test_only_the_copies_that_the_seed_has_confirmed_are_done() -> None:
    memory, into = GuardedMemory("cpu", [6 * BATCH], 1), GuardedMemory("cpu", [6 * BATCH], 2)
    made, done = export(memory, **DIRECT), list[int]()

    def all_but_two(message: list[Any]) -> list[Any] | None:
        return message if message[0] != "sent" else ["sent", 4] if message[1] == 6 else None

    with (
        served(made, all_but_two) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="deadline"),
    ):
        session.pull(batch_copies(memory, into, 6), time.monotonic() + 1.0, done.append, threading.Event())
    assert done == [0, 1, 2, 3]


def test_a_receive_that_ends_without_its_bytes_when_the_lease_ends_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with NCCL when the seed's communicator is aborted; here every receive over gloo ends so."""
    memory, into = GuardedMemory("cpu", [64 * BATCH], 1), GuardedMemory("cpu", [64 * BATCH], 2)
    made, done, sent = export(memory, rate_limit=16 * BATCH, **DIRECT), list[int](), [0]
    wait = GlooGroup.finish

    def finish(group: GlooGroup, operation: Any, check: Callable[[], object]) -> None:
        if group.rank == SEED:
            wait(group, operation, check)
            sent[0] += 1
        else:
            check()

    def then(i: int) -> None:
        assert i < sent[0]
        done.append(i)
        if len(done) == 3:
            assert made.close(time.monotonic() + SECONDS)

    monkeypatch.setattr(GlooGroup, "finish", finish)
    with (
        served(made) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed),
    ):
        session.pull(batch_copies(memory, into, 64), time.monotonic() + 2.0, then, threading.Event())
    assert 3 <= len(done) <= sent[0] < 64


def test_a_copy_that_the_seed_confirms_early_is_not_done_before_it_has_arrived() -> None:
    memory, into = GuardedMemory("cpu", [8 * BATCH], 1), GuardedMemory("cpu", [8 * BATCH], 2)
    made, done = export(memory, rate_limit=40 * BATCH, **DIRECT), list[int]()
    early: list[list[Any] | None] = [["sent", 8]]

    def all_at_once(message: list[Any]) -> list[Any] | None:
        return message if message[0] != "sent" else early.pop() if early else None

    def then(i: int) -> None:
        assert into.view(0, i * BATCH, BATCH).equal(memory.view(0, i * BATCH, BATCH))
        done.append(i)

    with (
        served(made, all_at_once) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
    ):
        session.pull(batch_copies(memory, into, 8), time.monotonic() + SECONDS, then, threading.Event())
    assert done == list(range(8))


@pytest.mark.parametrize("nonsense", [["sent", 7], ["sent", -1], ["sent", 0], ["sent", "all"], ["sent"], ["joined"]])
def test_a_confirmation_that_makes_no_sense_fails_the_pull(nonsense: list[Any]) -> None:
    memory, into = GuardedMemory("cpu", [6 * BATCH], 1), GuardedMemory("cpu", [6 * BATCH], 2)
    made = export(memory, **DIRECT)
    with (
        served(made, lambda message: nonsense if message[0] == "sent" else message) as (channel, _),
        opened(memory, into, channel, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="nothing of the kind"),
    ):
        session.pull(batch_copies(memory, into, 6), time.monotonic() + SECONDS, lambda _: None, threading.Event())


def test_the_seed_confirms_while_batches_leave_but_not_each_of_many() -> None:
    count = 2000
    memory, into = GuardedMemory("cpu", [count * BATCH], 1), GuardedMemory("cpu", [count * BATCH], 2)
    made, confirmed = export(memory, **DIRECT), list[int]()

    def keep(message: list[Any]) -> list[Any]:
        confirmed.extend(message[1:] if message[0] == "sent" else [])
        return message

    with served(made, keep) as (channel, _), opened(memory, into, channel, made.offer, **DIRECT) as session:
        started = time.monotonic()
        session.pull(batch_copies(memory, into, count), started + SECONDS, lambda _: None, threading.Event())
        seconds = time.monotonic() - started
    assert confirmed == sorted(set(confirmed))
    assert confirmed[0] == 1
    assert confirmed[-1] == count
    assert len(confirmed) <= seconds / REPORT_INTERVAL + 2


def test_a_batch_is_done_before_the_next_leaves_if_they_leave_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, into = GuardedMemory("cpu", [2 * BATCH], 1), GuardedMemory("cpu", [2 * BATCH], 2)
    made, done, started = export(memory, rate_limit=2 * BATCH, **DIRECT), threading.Event(), list[bool]()
    start = GlooGroup.start

    def start_when_the_last_is_done(group: GlooGroup, *args: Any) -> Any:
        if group.rank == SEED:
            started.append(not started or done.wait(SECONDS / 4))
        return start(group, *args)

    monkeypatch.setattr(GlooGroup, "start", start_when_the_last_is_done)
    with served(made) as (channel, _), opened(memory, into, channel, made.offer, **DIRECT) as session:
        session.pull(batch_copies(memory, into, 2), time.monotonic() + SECONDS, lambda _: done.set(), threading.Event())
    assert started == [True, True]


def test_a_batch_that_was_aborted_while_nccl_sent_it_was_not_sent() -> None:
    class Done:
        def synchronize(self) -> None:
            group.aborted = True  # as `abort` does first, before the end of the kernel is seen

    group = object.__new__(NcclGroup)
    group.rank, group.aborted = SEED, False
    with pytest.raises(TransferFailed):
        group.finish((Done(), None, None), lambda: None)
