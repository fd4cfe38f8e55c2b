"""The lock round an engine's reads: shared by reads from known peers, exclusive for the first read from a new one."""

import threading
import time
from contextlib import nullcontext

import pytest

from tensorfork import TransferFailed
from tensorfork.transports.transfer_engine import engine
from tensorfork.transports.transfer_engine.peer_lock import PeerLock

SOON = 20.0


@pytest.mark.parametrize("when", ["while it waits", "before it begins"])
def test_a_read_that_waits_for_the_lock_is_given_up_when_stop_is_set(when: str) -> None:
    waiting = engine.Engine.__new__(engine.Engine)
    waiting._fork_count, waiting._peer_lock, waiting._contacted = engine._fork_count, PeerLock(), set()
    stop = threading.Event()
    stop.set()
    other = (
        waiting._peer_lock.acquire(time.monotonic() + SOON, exclusive=True)
        if when == "while it waits"
        else nullcontext()
    )
    with other, pytest.raises(TransferFailed):
        waiting.read_batch("peer", [(0, 0, 1)], "cpu", time.monotonic() + 4 * SOON, stop)
    with waiting._peer_lock.acquire(time.monotonic() + SOON, exclusive=True):
        pass  # nobody holds it


def test_reads_from_known_peers_share_the_lock_and_a_first_read_excludes_all() -> None:
    lock = PeerLock()

    def refused(*, exclusive: bool) -> None:
        with (
            pytest.raises(TransferFailed, match="another peer"),
            lock.acquire(time.monotonic() + 0.05, exclusive=exclusive),
        ):
            pass

    with lock.acquire(time.monotonic() + SOON, exclusive=False), lock.acquire(time.monotonic() + SOON, exclusive=False):
        refused(exclusive=True)
    with lock.acquire(time.monotonic() + SOON, exclusive=True):
        refused(exclusive=False)
        refused(exclusive=True)
    with lock.acquire(time.monotonic() + SOON, exclusive=False):
        pass


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_interrupt_while_waiting_for_the_lock_leaves_it_free(
    exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = PeerLock()

    def interrupted(seconds: float) -> bool:
        raise KeyboardInterrupt

    with lock.acquire(time.monotonic() + SOON, exclusive=True), monkeypatch.context() as patch:
        patch.setattr(lock._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), lock.acquire(time.monotonic() + SOON, exclusive=exclusive):
            pass
    for again in (True, False):
        with lock.acquire(time.monotonic() + SOON, exclusive=again):
            pass


def test_a_waiting_exclusive_holder_comes_before_later_shared_ones() -> None:
    lock, order = PeerLock(), list[str]()

    def exclusive() -> None:
        with lock.acquire(time.monotonic() + SOON, exclusive=True):
            order.append("exclusive")

    def shared() -> None:
        with lock.acquire(time.monotonic() + SOON, exclusive=False):
            order.append("shared")

    first, second = threading.Thread(target=exclusive), threading.Thread(target=shared)
    with lock.acquire(time.monotonic() + SOON, exclusive=False):
        first.start()
        while not lock._exclusive_waiters:
            time.sleep(0.001)
        second.start()
        second.join(0.1)
        assert not order
    first.join(SOON)
    second.join(SOON)
    assert order == ["exclusive", "shared"]
