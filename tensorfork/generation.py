"""The generation of a seed's tensors, and what is computed once in each: their digests.

A seqlock. A writer makes the generation odd before its first change and even, by one more, after the last; a reader
takes it before and after, and has read one moment's bytes only if it was even and is the same. Nobody ever waits.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from tensorfork import cuda, wire
from tensorfork.bootstrap import Answer
from tensorfork.checksum import Checksums

log = logging.getLogger("tensorfork")


class Clock:
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


class DigestsOnce:
    """The digests of all tensors, computed once a generation, on a thread of its own, when first asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], clock: Clock) -> None:
        self._tensors, self._clock = tensors, clock
        self._lock = threading.Lock()
        self._waiting: list[Answer] = []
        self._known: tuple[int, list[bytes]] | None = None
        self._checksums: Checksums | None = None
        self._running = False
        self._cancel = threading.Event()
        self.computed = 0

    def begin(self) -> None:
        """Start computing, if that is still to be done."""
        with self._lock:
            if not self._running and (self._known is None or self._known[0] != self._clock.generation):
                self._running = True
                threading.Thread(target=self._compute, name="tensorfork-digest", daemon=True).start()

    def ask(self, answer: Answer) -> None:
        """Answer with them, now or when they are there."""
        with self._lock:
            if self._known is None or self._known[0] != self._clock.generation:
                self._waiting.append(answer)
                known = None
            else:
                known = self._known
        if known is None:
            self.begin()
        else:
            answer(wire.Digests(known[0], len(known[1])), known[1])

    def close(self) -> None:
        """Stop computing soon."""
        self._cancel.set()

    def _compute(self) -> None:
        cuda.relax_capture()
        generation = self._clock.generation
        reply: tuple[wire.Reply, list[bytes]]
        try:
            if self._checksums is None:
                self._checksums = Checksums.of(self._tensors)
            with cuda.aside({tensor.device for tensor in self._tensors.values()}):
                found = {} if generation % 2 else self._checksums.compute(self._stop(generation))
            if len(found) != len(self._tensors) or self._clock.generation != generation:
                reply = wire.Refused(wire.CHANGED, "the seed's weights changed while their digests were computed"), []
            else:
                frames = wire.pack_digests([found[name] for name in self._tensors])
                self._known = generation, frames
                self.computed += 1
                reply = wire.Digests(generation, len(frames)), frames
        except Exception as error:
            log.exception("computing the digests failed")
            reply = wire.Refused(wire.BUSY, f"the seed could not compute its digests: {error}"), []
        with self._lock:
            self._running = False
            waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(*reply)

    def _stop(self, generation: int) -> Callable[[], bool]:
        return lambda: self._cancel.is_set() or self._clock.generation != generation
