"""A copy is done when its bytes are here and the seed has confirmed that they left whole; over gloo."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from gloo_leases import DIRECT, PARCEL, SECONDS, export, opened, served, stripes

from tensorfork import TransferFailed
from tensorfork.testing.memory import Memory
from tensorfork.transports.process_group.export import CATCH_UP, TELL
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import SEED


def test_nothing_is_done_that_arrived_and_that_the_seed_has_not_confirmed() -> None:
    memory, into = Memory("cpu", [6 * PARCEL], 1), Memory("cpu", [6 * PARCEL], 2)
    made, done = export(memory, **DIRECT), list[int]()
    with (
        served(made, lambda words: None if words[0] == "sent" else words) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="deadline"),
    ):
        session.pull(stripes(memory, into, 6), time.monotonic() + 1.0, done.append, threading.Event())
    assert into.read(0, 0, 6 * PARCEL).equal(memory.read(0, 0, 6 * PARCEL)), "this test needs all of it to arrive"
    assert not done


def test_what_the_seed_has_confirmed_is_done_and_no_more() -> None:
    memory, into = Memory("cpu", [6 * PARCEL], 1), Memory("cpu", [6 * PARCEL], 2)
    made, done = export(memory, **DIRECT), list[int]()

    def all_but_two(words: list[Any]) -> list[Any] | None:
        return words if words[0] != "sent" else ["sent", 4] if words[1] == 6 else None

    with (
        served(made, all_but_two) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="deadline"),
    ):
        session.pull(stripes(memory, into, 6), time.monotonic() + 1.0, done.append, threading.Event())
    assert done == [0, 1, 2, 3]


def test_a_receive_that_ends_without_its_bytes_when_the_lease_ends_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's does, when the seed's communicator is aborted; here gloo's does so from the beginning."""
    memory, into = Memory("cpu", [64 * PARCEL], 1), Memory("cpu", [64 * PARCEL], 2)
    made, done, sent = export(memory, rate_limit=16 * PARCEL, **DIRECT), list[int](), [0]
    wait = GlooGroup.finish

    def finish(lane: GlooGroup, begun: Any, look: Callable[[], object]) -> None:
        if lane.rank == SEED:
            wait(lane, begun, look)
            sent[0] += 1
        else:
            look()

    def then(i: int) -> None:
        assert i < sent[0]
        done.append(i)
        if len(done) == 3:
            assert made.close(time.monotonic() + SECONDS)

    monkeypatch.setattr(GlooGroup, "finish", finish)
    with (
        served(made) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed),
    ):
        session.pull(stripes(memory, into, 64), time.monotonic() + 2.0, then, threading.Event())
    assert 3 <= len(done) <= sent[0] < 64


def test_what_the_seed_confirms_early_is_not_done_before_it_is_there() -> None:
    memory, into = Memory("cpu", [8 * PARCEL], 1), Memory("cpu", [8 * PARCEL], 2)
    made, done = export(memory, rate_limit=40 * PARCEL, **DIRECT), list[int]()
    early: list[list[Any] | None] = [["sent", 8]]

    def all_at_once(words: list[Any]) -> list[Any] | None:
        return words if words[0] != "sent" else early.pop() if early else None

    def then(i: int) -> None:
        assert into.read(0, i * PARCEL, PARCEL).equal(memory.read(0, i * PARCEL, PARCEL))
        done.append(i)

    with (
        served(made, all_at_once) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
    ):
        session.pull(stripes(memory, into, 8), time.monotonic() + SECONDS, then, threading.Event())
    assert done == list(range(8))


@pytest.mark.parametrize("nonsense", [["sent", 7], ["sent", -1], ["sent", 0], ["sent", "all"], ["sent"], ["joined"]])
def test_a_seed_that_confirms_what_makes_no_sense_fails_the_pull(nonsense: list[Any]) -> None:
    memory, into = Memory("cpu", [6 * PARCEL], 1), Memory("cpu", [6 * PARCEL], 2)
    made = export(memory, **DIRECT)
    with (
        served(made, lambda words: nonsense if words[0] == "sent" else words) as (speaker, _),
        opened(memory, into, speaker, made.offer, **DIRECT) as session,
        pytest.raises(TransferFailed, match="nothing of the kind"),
    ):
        session.pull(stripes(memory, into, 6), time.monotonic() + SECONDS, lambda _: None, threading.Event())


def test_the_seed_confirms_while_parcels_leave_but_not_each_of_many() -> None:
    count = 2000
    memory, into = Memory("cpu", [count * PARCEL], 1), Memory("cpu", [count * PARCEL], 2)
    made, confirmed = export(memory, **DIRECT), list[int]()

    def keep(words: list[Any]) -> list[Any]:
        confirmed.extend(words[1:] if words[0] == "sent" else [])
        return words

    with served(made, keep) as (speaker, _), opened(memory, into, speaker, made.offer, **DIRECT) as session:
        started = time.monotonic()
        session.pull(stripes(memory, into, count), started + SECONDS, lambda _: None, threading.Event())
        seconds = time.monotonic() - started
    assert confirmed == sorted(set(confirmed))
    assert confirmed[0] == 1
    assert confirmed[-1] == count
    assert len(confirmed) <= (seconds + CATCH_UP) / TELL + 2


def test_a_parcel_is_done_before_the_next_leaves_where_they_leave_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, into = Memory("cpu", [2 * PARCEL], 1), Memory("cpu", [2 * PARCEL], 2)
    made, done, begun = export(memory, rate_limit=2 * PARCEL, **DIRECT), threading.Event(), list[bool]()
    begin = GlooGroup.begin

    def when_the_last_is_done(lane: GlooGroup, *args: Any) -> Any:
        if lane.rank == SEED:
            begun.append(not begun or done.wait(SECONDS / 4))
        return begin(lane, *args)

    monkeypatch.setattr(GlooGroup, "begin", when_the_last_is_done)
    with served(made) as (speaker, _), opened(memory, into, speaker, made.offer, **DIRECT) as session:
        session.pull(stripes(memory, into, 2), time.monotonic() + SECONDS, lambda _: done.set(), threading.Event())
    assert begun == [True, True]


def test_a_lane_that_was_aborted_while_nccl_sent_has_sent_nothing() -> None:
    class Done:
        def synchronize(self) -> None:
            lane.aborted = True  # as `abort` says first, before the kernel's end is seen

    lane = object.__new__(NcclGroup)
    lane.rank, lane.aborted = SEED, False
    with pytest.raises(TransferFailed):
        lane.finish((Done(), None, None), lambda: None)
