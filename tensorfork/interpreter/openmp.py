"""OpenMP's threads: keeping torch's operations of one thread on that thread.

Why: for an operation on 32,768 elements or more, torch wakes its OpenMP threads. Two processes that both did so on two
cores were seen to stand still for 42 s. OpenMP's own setting belongs to the calling thread;
`torch.set_num_threads` would set the whole process's.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from tensorfork.interpreter.settings import process_settings_allowed


@contextmanager
def single_threaded() -> Iterator[bool]:
    """Inside, torch's operations on this thread wake no other thread, however large they are.

    Yields whether that holds: not where torch has no OpenMP, or process-wide settings are forbidden.
    """
    usual = torch.get_num_threads()
    library = _openmp() if usual > 1 and process_settings_allowed() else None
    if library is None:
        yield usual == 1
        return
    library.omp_set_num_threads(1)
    try:
        yield torch.get_num_threads() == 1
    finally:
        library.omp_set_num_threads(usual)


@cache
def _openmp() -> Any:
    """The OpenMP library that torch has loaded; None where there is none."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads.argtypes, library.omp_set_num_threads.restype = [ctypes.c_int], None
    except (OSError, AttributeError):
        return None
    return library
