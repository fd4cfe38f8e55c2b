"""Threads of Python's and torch's, and how they share the interpreter and the cores."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

TURN = 20e-6
"""Seconds."""


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


class _Turns:
    """Inside, threads that want the interpreter get it within 20 µs, and not only after Python's 5 ms: for a thread
    with many short calls to make, such as to the CUDA driver, beside one that computes. It is the whole process's
    setting, to be kept for milliseconds; what computes takes a tenth longer.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._usual = threading.Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = sys.getswitchinterval()
            self._inside += 1
            sys.setswitchinterval(min(self._usual, TURN))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._usual)

    def after_fork(self) -> None:
        """In the child: whoever was inside is not there."""
        if self._inside:
            sys.setswitchinterval(self._usual)
        self._lock, self._inside = threading.Lock(), 0


short_turns = _Turns()
os.register_at_fork(after_in_child=short_turns.after_fork)


@cache
def _openmp() -> Any:
    """The OpenMP that torch has loaded for everybody; None where there is none."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads.argtypes, library.omp_set_num_threads.restype = [ctypes.c_int], None
    except (OSError, AttributeError):
        return None
    return library
