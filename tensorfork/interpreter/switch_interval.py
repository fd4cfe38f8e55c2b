"""A short switch interval: how soon a thread that waits for the interpreter gets it.

Why: a thread that makes many short calls, such as to the CUDA driver, waits for the interpreter after each of them, for
Python's default of 5 ms beside a thread that computes. Opening 31 CUDA IPC handles took 166 ms that way; with 20 µs,
770 handles took 127 ms, and the computing thread became a tenth slower.
"""

import os
import sys
import threading

from tensorfork.interpreter.settings import process_settings_allowed

SECONDS = 20e-6


class _ShortSwitchInterval:
    """A context manager for any number of threads: inside, the whole process's switch interval is at most `SECONDS`.

    Keep it to milliseconds. Does nothing where process-wide settings are forbidden.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._usual, self._changed = threading.Lock(), 0, 0.0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = sys.getswitchinterval()
            self._inside += 1
            if process_settings_allowed():
                self._changed = True
                sys.setswitchinterval(min(self._usual, SECONDS))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._changed:
                self._changed = False
                sys.setswitchinterval(self._usual)

    def after_fork(self) -> None:
        """In the child, the threads that were inside do not exist."""
        if self._inside and self._changed:
            sys.setswitchinterval(self._usual)
        self._lock, self._inside, self._changed = threading.Lock(), 0, False


short_switch_interval = _ShortSwitchInterval()
os.register_at_fork(after_in_child=short_switch_interval.after_fork)
