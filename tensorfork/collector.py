"""Python's garbage collector, where thousands of objects are made at once that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off_collections() -> Iterator[None]:
    """Put garbage collection off: looking through what is made inside would take as long as making it.

    Only round what neither waits nor asks anybody: it is off for the whole process, and comes on again at the end
    even where somebody else has switched it off meanwhile.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
