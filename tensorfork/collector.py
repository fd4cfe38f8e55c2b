"""Python's garbage collector, where thousands of objects are made at once that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def put_off_collections() -> Iterator[None]:
    """Put garbage collection off: looking through what is made inside would take as long as making it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
