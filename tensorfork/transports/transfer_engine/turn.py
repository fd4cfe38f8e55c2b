"""Who may call an engine."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tensorfork.errors import TransferFailed

LOOK = 0.05
"""Seconds between two looks whether one that waits is still wanted."""


class Turn:
    """Many at once whose peer the engine knows, or one alone whose peer it does not: until that one has answered,
    Mooncake keeps everybody else waiting too, for up to 60 s, where no deadline reaches them. Here it does.

    Who wants to be alone comes before all that have not begun.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._queue = 0
        self._alone = False

    @contextmanager
    def take(self, deadline: float, *, alone: bool, enough: threading.Event | None = None) -> Iterator[None]:
        """Inside, it is one's turn. Raises `TransferFailed` at the deadline, and once there is enough."""
        with self._changed:
            self._queue += alone
            try:
                while self._alone or (self._inside if alone else self._queue):
                    left = deadline - time.monotonic()
                    if left <= 0 or (enough is not None and enough.is_set()):
                        raise TransferFailed("the engine is waiting for another peer, which does not answer")
                    self._changed.wait(min(LOOK, left))
                if enough is not None and enough.is_set():
                    raise TransferFailed("the transfer was cancelled")
                self._inside += 1
                self._alone = alone
            finally:
                self._queue -= alone
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()
