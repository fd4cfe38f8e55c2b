"""Keeps torch's operations on one thread to that thread."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def alone() -> Iterator[bool]:
    """Inside, torch's operations on this thread wake no other, however large they are: true where that could be had.

    By OpenMP's own setting, which is one of this thread's; `torch.set_num_threads` is one of the whole process's.
    """
    usual = torch.get_num_threads()
    library = _openmp()
    if usual == 1 or library is None:
        yield usual == 1
        return
    library.omp_set_num_threads(1)
    try:
        yield torch.get_num_threads() == 1
    finally:
        library.omp_set_num_threads(usual)


@cache
def _openmp() -> Any:
    """The OpenMP that torch has loaded for everybody; None where there is none."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads.argtypes, library.omp_set_num_threads.restype = [ctypes.c_int], None
    except (OSError, AttributeError):
        return None
    return library
