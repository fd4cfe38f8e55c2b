"""Work that nothing can interrupt, on threads of its own, and a watchdog that aborts what hangs."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from tensorfork.memory import cuda

T = TypeVar("T")

POLL = 0.02
"""Seconds between two looks at what may end a wait."""


class BackgroundTask(Generic[T]):
    """Work on a thread of its own, since torch has calls that nothing can interrupt.

    Whoever no longer waits says so; should the work come to its end after all, `discard` is then called with what it
    made.
    """

    def __init__(self, work: Callable[[], T], discard: Callable[[T], object], name: str) -> None:
        self._work, self._discard = work, discard
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._given_up = False
        self._made: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self, look: Callable[[], object]) -> T:
        """What the work made, or raised. `look` is called now and then, and may raise to end the wait."""
        try:
            while not self._over.wait(POLL):
                look()
        except BaseException:
            self.give_up()
            raise
        if self._error is not None:
            raise self._error
        return self._made[0]

    def give_up(self, seconds: float = 0.0) -> None:
        """Nobody waits any more, but for so many seconds for its end."""
        with self._lock:
            self._given_up = True
            made, self._made = self._made, []
        for one in made:
            self._discard(one)
        if seconds:
            self._over.wait(seconds)

    def _run(self) -> None:
        cuda.relax_capture()
        try:
            made = self._work()
        except BaseException as error:
            self._error = error
        else:
            with self._lock:
                unwanted = self._given_up
                if not unwanted:
                    self._made.append(made)
            if unwanted:
                self._discard(made)
        self._over.set()


def run_together(
    works: Iterable[Callable[[], T]], discard: Callable[[T], object], name: str, look: Callable[[], object]
) -> list[T]:
    """What several works made, each on a thread of its own. Should one fail, everything is discarded."""
    tasks = [BackgroundTask(work, discard, name) for work in works]
    try:
        return [task.result(look) for task in tasks]
    except BaseException:
        for task in tasks:
            task.give_up()
        raise


class Watchdog:
    """Calls `abort` from a thread of its own, once, with the reason, when it is time: past `until`, or when told to;
    from `begin` on, which is to be called before anything that may hang.

    `until` may be moved at any time. `reason` is empty as long as there was none.
    """

    def __init__(self, until: float, late: str, cancel: threading.Event | None, abort: Callable[[], None]) -> None:
        self.until, self.reason = until, ""
        self._late, self._cancel, self._abort = late, cancel, abort
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-watch", daemon=True)

    def begin(self) -> None:
        """Watch; nothing new where it does."""
        if self._thread.ident is None:
            self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(POLL if self._cancel is not None else 0.1):
            if self._cancel is not None and self._cancel.is_set():
                self.reason = "the transfer was cancelled"
            elif time.monotonic() >= self.until:
                self.reason = self._late
            if self.reason:
                self._abort()
                return
