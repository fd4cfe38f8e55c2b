"""The end of the process: by then no thread may be inside a library.

Python ends a thread that takes the interpreter's lock too late by unwinding its stack, and the process aborts where
that stack is in the middle of torch. So what runs on other threads is `guarded`: at exit it is told to stop, and
waited for. It stops within milliseconds, since long work asks `check` between its parts.
"""

import atexit
import itertools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Self

log = logging.getLogger("tensorfork")

EXIT_TIMEOUT = 2.0
"""Seconds that Python's exit waits for all of it: what is inside a call of a library then cannot be stopped."""

Stop = Callable[[float], object]
"""Ends something by a deadline, a moment of `time.monotonic()`."""


class _Ending:
    """What runs, and what to do at exit."""

    def __init__(self) -> None:
        self.first: list[Stop] = []
        self.last: list[Callable[[], object]] = []
        self.reset()

    def reset(self) -> None:
        """For the child of `os.fork()`, in which none of the threads is."""
        self.changed = threading.Condition()
        self.running: dict[int, tuple[int, Callable[[], object] | None]] = {}
        self.numbers = itertools.count()
        self.by: int | None = None
        """The thread on which Python ends, once it does."""


_ending = _Ending()


class guarded:  # noqa: N801  # reads as the function that it could be
    """A context manager around what a thread does inside libraries. Exit waits until the block has been left.

    Args:
        stop: called at exit, on the thread that exits; it must not wait.

    Entering it raises `SystemExit` once the process ends, which ends a thread silently.
    """

    def __init__(self, stop: Callable[[], object] | None = None) -> None:
        self._stop = stop

    def __enter__(self) -> Self:
        with _ending.changed:
            check()
            self._number = next(_ending.numbers)
            _ending.running[self._number] = threading.get_ident(), self._stop
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _ending.by is not None and error is not None:
            _free_locals(error)
        with _ending.changed:
            _ending.running.pop(self._number, None)
            if _ending.by is not None:
                _ending.changed.notify_all()


def _free_locals(error: BaseException | None) -> None:
    """Free now what the frames hold that an error has ended, and what led to it: tensors are freed by torch."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def check() -> None:
    """Raise `SystemExit` once the process ends; not on the thread on which it does."""
    if _ending.by is not None and _ending.by != threading.get_ident():
        raise SystemExit("the process is ending")


def begun() -> bool:
    """Whether the process ends."""
    return _ending.by is not None


def at_exit(stop: Stop) -> None:
    """Have this called at exit, before `guarded` work is waited for."""
    _ending.first.append(stop)


def after_exit(call: Callable[[], object]) -> None:
    """Have this called at exit, once nothing runs any more; what was given last comes first."""
    _ending.last.insert(0, call)


@atexit.register
def _end() -> None:
    until = time.monotonic() + EXIT_TIMEOUT
    with _ending.changed:
        _ending.by = threading.get_ident()
        stops = [stop for _, stop in _ending.running.values() if stop is not None]
    for stop in stops:
        _quietly(stop)
    for close in _ending.first:
        _quietly(close, until)
    with _ending.changed:
        _ending.changed.wait_for(lambda: not _others(), max(0.0, until - time.monotonic()))
    for call in _ending.last:
        _quietly(call)


def _others() -> list[int]:
    return [number for number, (thread, _) in _ending.running.items() if thread != _ending.by]


def _quietly(call: Callable[..., object], *args: float) -> None:
    try:
        call(*args)
    except Exception:  # the rest must be done all the same
        log.exception("ending something failed")


os.register_at_fork(after_in_child=_ending.reset)
