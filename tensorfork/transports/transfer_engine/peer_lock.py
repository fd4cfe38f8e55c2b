"""Who may call an engine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tensorfork.errors import TransferFailed

LOOK = 0.05
"""Seconds between two looks whether one that waits is still wanted."""


class PeerLock:
    """Many at once whose peer the engine knows, or one alone whose peer it does not: until that one has answered,
    Mooncake keeps everybody else waiting too, for up to 60 s, where no deadline reaches them. Here it does.

    Who wants to be alone comes before all that have not begun.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[object, bool] = {}  # whether alone
        self._queue: set[object] = set()  # who wants to be

    @contextmanager
    def take(self, deadline: float, *, alone: bool, enough: threading.Event | None = None) -> Iterator[None]:
        """Inside, it is one's turn. Raises `TransferFailed` at the deadline, and once there is enough."""
        me = object()
        try:  # wherever an interrupt comes, nothing of this caller's stays
            with self._changed:
                if alone:
                    self._queue.add(me)
                while any(self._inside.values()) or (self._inside if alone else self._queue):
                    left = deadline - time.monotonic()
                    if left <= 0 or (enough is not None and enough.is_set()):
                        raise TransferFailed("the engine is waiting for another peer, which does not answer")
                    self._changed.wait(min(LOOK, left))
                if enough is not None and enough.is_set():
                    raise TransferFailed("the transfer was cancelled")
                self._inside[me] = alone
                self._queue.discard(me)
            yield
        finally:
            with self._changed:
                self._inside.pop(me, None)
                self._queue.discard(me)
                self._changed.notify_all()
