"""The lock round an engine's reads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tensorfork.errors import TransferFailed

POLL_INTERVAL = 0.05
"""Seconds between two checks of the stop event by a thread that waits for the lock."""


class PeerLock:
    """A readers-writer lock with priority for the exclusive side, deadlines, and a stop event.

    Reads from peers that the engine has contacted before share it. The first read from a new peer holds it exclusively:
    until that peer has answered, Mooncake makes every other read wait as well, for up to 60 s and without a deadline.
    With the lock, they wait here instead, with their deadlines.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: dict[object, bool] = {}
        """Whether each holds it exclusively."""
        self._exclusive_waiters: set[object] = set()

    @contextmanager
    def acquire(self, deadline: float, *, exclusive: bool, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the lock inside. Raises `TransferFailed` at the deadline, or once `stop` is set; it is then not held."""
        holder = object()
        try:  # an interrupt anywhere in here leaves nothing of this caller behind
            with self._changed:
                if exclusive:
                    self._exclusive_waiters.add(holder)
                while self._must_wait(exclusive):
                    time_left = deadline - time.monotonic()
                    if time_left <= 0 or (stop is not None and stop.is_set()):
                        raise TransferFailed("the engine is waiting for another peer, which does not answer")
                    self._changed.wait(min(POLL_INTERVAL, time_left))
                if stop is not None and stop.is_set():
                    raise TransferFailed("the transfer was cancelled")
                self._holders[holder] = exclusive
                self._exclusive_waiters.discard(holder)
            yield
        finally:
            with self._changed:
                self._holders.pop(holder, None)
                self._exclusive_waiters.discard(holder)
                self._changed.notify_all()

    def _must_wait(self, exclusive: bool) -> bool:
        if exclusive:
            return bool(self._holders)
        return bool(self._exclusive_waiters) or any(self._holders.values())
