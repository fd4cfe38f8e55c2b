"""Calls that cannot be interrupted, on threads of their own, and a watchdog that aborts what hangs."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from tensorfork.interpreter import ending
from tensorfork.memory import cuda

T = TypeVar("T")

POLL_INTERVAL = 0.02
"""Seconds between two checks whether a wait is to end early."""


class BackgroundTask(Generic[T]):
    """A call on a thread of its own, since torch has calls that cannot be interrupted.

    A task can be abandoned before it has ended. When its call returns after that, `discard` is called with the result.
    """

    def __init__(self, function: Callable[[], T], discard: Callable[[T], object], name: str) -> None:
        self._function, self._discard = function, discard
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._abandoned = False
        self._results: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self, check: Callable[[], object]) -> T:
        """Wait for the call; return what it returned, or raise what it raised.

        `check` is called every `POLL_INTERVAL`. If it raises, the task is abandoned and the exception is passed on.
        """
        try:
            while not self._finished.wait(POLL_INTERVAL):
                check()
        except BaseException:
            self.abandon()
            raise
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # which would keep this frame, and what the caller's hold
        return self._results[0]

    def abandon(self, seconds: float = 0.0) -> None:
        """Discard the result, now or when there is one. Waits at most so many seconds for the call to end."""
        with self._lock:
            self._abandoned = True
            results, self._results = self._results, []
        for result in results:
            self._discard(result)
        if seconds:
            self._finished.wait(seconds)

    def _run(self) -> None:
        try:
            with ending.guarded():
                self._call()
        except BaseException as error:
            self._error = error
            traceback.clear_frames(error.__traceback__)  # it stays until garbage is collected; not what failed with it
        self._finished.set()

    def _call(self) -> None:
        cuda.relax_capture()
        result = self._function()
        with self._lock:
            abandoned = self._abandoned
            if not abandoned:
                self._results.append(result)
        if abandoned:
            self._discard(result)


def run_together(
    functions: Iterable[Callable[[], T]], discard: Callable[[T], object], name: str, check: Callable[[], object]
) -> list[T]:
    """Call several functions, each on a thread of its own, and return their results in order.

    `check` is called while waiting, and may raise. If it or a function raises, all results are discarded, and the
    exception is passed on.
    """
    tasks = [BackgroundTask(function, discard, name) for function in functions]
    try:
        return [task.result(check) for task in tasks]
    except BaseException:
        for task in tasks:
            task.abandon()
        raise


class Watchdog:
    """Calls `abort` once, from a thread of its own, at the deadline or when `cancel` is set.

    `start` must be called before anything that may hang; before that, nothing is watched. `deadline` may be moved at
    any time. `reason` says why `abort` was called, and is empty until then.

    Args:
        deadline: when to abort.
        late: the reason to give at the deadline.
        cancel: an event that aborts too, or None.
        abort: what to call.
    """

    def __init__(self, deadline: float, late: str, cancel: threading.Event | None, abort: Callable[[], None]) -> None:
        self.deadline, self.reason = deadline, ""
        self._late, self._cancel, self._abort = late, cancel, abort
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-watchdog", daemon=True)

    def start(self) -> None:
        """Start watching. A second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with ending.guarded(self._stopped.set):
            self._watch()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_INTERVAL if self._cancel is not None else 0.1):
            if self._cancel is not None and self._cancel.is_set():
                self.reason = "the transfer was cancelled"
            elif time.monotonic() >= self.deadline:
                self.reason = self._late
            if self.reason:
                self._abort()
                return
