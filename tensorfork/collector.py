"""Python's garbage collector, where thousands of objects are made at once that all stay."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off_collections(at_most: float | None = None) -> Iterator[None]:
    """Put garbage collection off: looking through what is made inside would take as long as making it, and through all
    that an engine has made, 20 ms.

    It is off for the whole process, and comes on again at the end even where somebody else has switched it off
    meanwhile; or `at_most` so many seconds after the beginning, which is to be said round what waits for anybody, and
    is then left alone. A process that is forked off meanwhile has it on.
    """
    if not gc.isenabled():
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
    """One time without collections; ends once."""

    def __init__(self) -> None:
        self._lock, self._over = threading.Lock(), False
        _under_way.add(self)
        gc.disable()

    def end(self) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                _under_way.discard(self)
                gc.enable()


_under_way: set[_Pause] = set()


def _after_fork() -> None:
    """In the child: whoever would have ended these is not there."""
    if _under_way:
        _under_way.clear()
        gc.enable()


os.register_at_fork(after_in_child=_after_fork)
