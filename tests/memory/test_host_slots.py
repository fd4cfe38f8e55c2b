"""The pool of slots: bounded, in shares that nobody else can use up, and gone when no share is open."""

import ctypes
import os
import threading
from collections.abc import Sequence
from itertools import pairwise

import psutil
import pytest

from tensorfork.memory import host_slots
from tensorfork.memory.host_slots import POOL_BYTES, SHARES, NoShareLeft, Share, SlotPool

MOST = sum(count for count, _, _ in SHARES)


def spans(shares: Sequence[Share]) -> list[tuple[int, int]]:
    """Every slot, as (address, end), in order."""
    return sorted((slot, slot + share.slot_bytes) for share in shares for slot in share.slots)


@pytest.fixture
def pool() -> SlotPool:
    return SlotPool()


def test_all_shares_together_are_the_pool_and_none_overlaps_another(pool: SlotPool) -> None:
    shares = [pool.open_share() for _ in range(MOST)]
    found = spans(shares)
    assert all(end <= start for (_, end), (start, _) in pairwise(found))
    assert found[-1][1] - found[0][0] == sum(end - start for start, end in found) == POOL_BYTES == 32 << 20
    for i, (start, end) in enumerate(found):
        ctypes.memset(start, i % 256, end - start)
    for i, (start, end) in enumerate(found):
        assert ctypes.string_at(start, 1) + ctypes.string_at(end - 1, 1) == bytes([i % 256] * 2)
    for share in shares:
        share.close()


def test_there_are_no_more_shares_than_that_until_one_is_closed(pool: SlotPool) -> None:
    shares = [pool.open_share() for _ in range(MOST)]
    with pytest.raises(NoShareLeft, match=f"{MOST} leases"):
        pool.open_share()
    shares.pop(0).close()
    assert pool.open_share().slot_bytes == SHARES[0][2]


def test_the_first_shares_have_the_largest_slots_and_each_has_two_at_least(pool: SlotPool) -> None:
    shares = [pool.open_share() for _ in range(MOST)]
    sizes = [share.slot_bytes for share in shares]
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(share.slots) >= 2 for share in shares)
    assert MOST >= 64  # the leases of a seed


def test_a_share_that_stays_open_is_untouched_by_others_that_come_and_go(pool: SlotPool) -> None:
    kept = pool.open_share()
    for slot in kept.slots:
        ctypes.memset(slot, 7, kept.slot_bytes)
    for _ in range(3):
        others = [pool.open_share() for _ in range(MOST - 1)]
        for start, end in spans(others):
            ctypes.memset(start, 9, end - start)
        for share in others:
            share.close()
    assert {ctypes.string_at(slot, kept.slot_bytes) for slot in kept.slots} == {b"\7" * kept.slot_bytes}


def test_memory_is_mapped_while_a_share_is_open_and_only_what_was_used_is_there(pool: SlotPool) -> None:
    process = psutil.Process()
    one, other = pool.open_share(), pool.open_share()
    before = process.memory_info().rss
    ctypes.memset(one.slots[0], 1, one.slot_bytes)
    used = process.memory_info().rss - before
    assert used < 2 * one.slot_bytes + (4 << 20)
    other.close()
    assert pool._memory is not None
    one.close()
    assert pool._memory is None


def test_shares_are_given_to_threads_at_the_same_time(pool: SlotPool) -> None:
    found: list[Share] = []

    def run() -> None:
        for _ in range(300):
            pool.open_share().close()
        found.append(pool.open_share())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({slot for share in found for slot in share.slots}) == sum(len(share.slots) for share in found)
    assert len(found) == 8


def test_a_child_of_os_fork_has_a_pool_of_its_own() -> None:
    parents = host_slots.pool()
    assert host_slots.pool() is parents
    share = parents.open_share()
    ctypes.memset(share.slots[0], 5, 100)
    with parents._lock:  # another thread of the parent's may hold it at that moment
        child = os.fork()
        if not child:
            own = host_slots.pool()
            taken = own.open_share()
            ctypes.memset(taken.slots[0], 6, 100)
            taken.close()
            os._exit(0 if own is not parents else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ctypes.string_at(share.slots[0], 100) == b"\5" * 100
    share.close()
