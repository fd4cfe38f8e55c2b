"""The first contact of an engine with a peer, on a thread of its own."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from tensorfork.errors import TransferFailed

CHECK_SECONDS = 0.1
"""Seconds between two checks whether the handshake is still waited for."""


class _CanBreak(Protocol):
    broken: bool


class Handshake:
    """Runs `work`, which reads from a peer for the first time, on another thread.

    Mooncake fetches the peer's description inside that first read, and waits 60 s for a peer that is stopped. The
    caller waits for the thread with `wait_finished`; `wait_connected` returns earlier, once the peer has answered.

    Args:
        engine: its `broken` is set when a wait ends before the handshake does.
        work: is given a function to call once the peer has answered, if it goes on to do more.
        check: called while waiting; ends the wait if it raises.
    """

    def __init__(
        self,
        engine: _CanBreak,
        work: Callable[[Callable[[], None]], Any],
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._engine, self._work, self._check = engine, work, check
        self._error: Exception | None = None
        self._connected, self._finished = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="tensorfork-handshake", daemon=True).start()

    def wait_connected(self, deadline: float) -> None:
        """Wait until the peer has answered. Raises what `work` raised.

        If that has not happened by the deadline, raises `TransferFailed`, and the engine counts as broken.
        """
        self._wait(self._connected, deadline)

    def wait_finished(self, deadline: float) -> None:
        """The same, until `work` has ended."""
        self._wait(self._finished, deadline)

    def _wait(self, event: threading.Event, deadline: float) -> None:
        try:
            while not event.wait(max(0.0, min(CHECK_SECONDS, deadline - time.monotonic()))):
                if time.monotonic() < deadline:
                    self._check()
                    continue
                raise TransferFailed("the seed's engine did not answer by the deadline: it is stopped, or unreachable")
        finally:
            if not event.is_set():
                self._engine.broken = True
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work(self._connected.set)
        except Exception as error:
            self._error = error
        finally:
            self._connected.set()
            self._finished.set()
