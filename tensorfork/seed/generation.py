"""The generation of a seed's tensors, and what is computed once in each: their digests.

A seqlock. A writer makes the generation odd before its first change and even, by one more, after the last; a reader
takes it before and after, and has read one moment's bytes only if it was even and is the same. Nobody ever waits.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SeqLock:
    """The generation: a seqlock whose writers say when they change the tensors. Readers never wait, and never block."""

    def __init__(self, devices: frozenset[torch.device]) -> None:
        self.generation = 0
        self.changing = threading.Event()
        self._devices = devices
        self._lock = threading.Lock()
        self._writers = 0
        self._failed = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Round one writer's change; see `Seed.updating`."""
        with self._lock:
            if not self._writers:
                self._failed = False
            self._writers += 1
            if self.generation % 2 == 0:
                self.generation += 1
            self.changing.set()
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
                    self.changing.clear()
                    self.generation += 1
