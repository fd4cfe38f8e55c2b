"""Pausing Python's cyclic garbage collector while thousands of objects are made that all stay.

Why: a collection that starts meanwhile traverses every object of the process. That takes as long as making the objects
does, and 20 ms for all that an engine has made.
"""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tensorfork.interpreter.settings import process_settings_allowed


@contextmanager
def gc_paused(at_most: float | None = None) -> Iterator[None]:
    """Inside, the whole process collects no garbage.

    Collection is on again at the end, even where somebody else has switched it off meanwhile. With `at_most`, it is on
    again after so many seconds; give that around anything that waits for a peer. A process that is forked off meanwhile
    has it on. Does nothing where collection is off already, or process-wide settings are forbidden.
    """
    if not gc.isenabled() or not process_settings_allowed():
        yield
        return
    pause = _Pause()
    timer = None
    try:
        if at_most is not None:
            timer = threading.Timer(at_most, pause.end)
            timer.daemon = True
            timer.start()
        yield
    finally:
        if timer is not None:
            timer.cancel()
        pause.end()


class _Pause:
    """One pause; ends once."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), False
        _active.add(self)
        gc.disable()

    def end(self) -> None:
        with self._lock:
            if not self._ended:
                self._ended = True
                _active.discard(self)
                gc.enable()


_active: set[_Pause] = set()


def _after_fork() -> None:
    """In the child, the threads that would have ended these pauses do not exist."""
    if _active:
        _active.clear()
        gc.enable()


os.register_at_fork(after_in_child=_after_fork)
