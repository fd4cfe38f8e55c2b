"""Python's garbage collector, where thousands of objects are made at once that all stay."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off_collections(at_most: float | None = None) -> Iterator[None]:
    """Put garbage collection off: looking through what is made inside would take as long as making it, and through all
    that an engine has made, 20 ms.

    It is off for the whole process, and comes on again at the end even where somebody else has switched it off
    meanwhile; or `at_most` so many seconds later, which is to be said round what waits for anybody.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    timer = None
    if at_most is not None:
        timer = threading.Timer(at_most, gc.enable)
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        gc.enable()
