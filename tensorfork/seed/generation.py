"""The generation of a seed's tensors: a seqlock.

A writer makes the generation odd before its first change, and even again, by adding one more, after its last. A reader
takes the generation before and after it reads: it has read the bytes of one moment only if the two are equal and even.
Nobody ever waits.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SeqLock:
    """A seqlock around the seed's tensors. Writers enter `updating`; readers compare `generation` before and after."""

    def __init__(self, devices: frozenset[torch.device]) -> None:
        self.generation = 0
        self._devices = devices
        self._lock = threading.Lock()
        self._writers = 0
        self._failed = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around one writer's change; see `Seed.updating`. Writers may overlap: the last to leave makes it even."""
        with self._lock:
            if not self._writers:
                self._failed = False
            self._writers += 1
            if self.generation % 2 == 0:
                self.generation += 1
        finished = False
        try:
            yield
            for device in self._devices:
                torch.cuda.current_stream(device).synchronize()
            finished = True
        finally:
            with self._lock:
                self._writers -= 1
                self._failed = self._failed or not finished
                if not self._writers and not self._failed:
                    self.generation += 1
