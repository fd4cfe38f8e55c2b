"""A seed's digests: computed once a generation, on a thread of its own, when first asked for."""

import logging
import threading
from collections.abc import Callable, Mapping

import torch

from tensorfork.digest.batch import DigestBatch
from tensorfork.memory import cuda, streams
from tensorfork.seed.generation import SeqLock
from tensorfork.wire import messages, tables
from tensorfork.wire.listener import SendReply

log = logging.getLogger("tensorfork")


class DigestCache:
    """The digests of all tensors, computed once a generation, on a thread of its own, when first asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], clock: SeqLock) -> None:
        self._tensors, self._clock = tensors, clock
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, SendReply]] = []
        self._known: tuple[int, list[bytes]] | None = None
        self._checksums: DigestBatch | None = None
        self._running = False
        self._cancel = threading.Event()
        self.computed = 0

    def begin(self) -> None:
        """Start computing, if that is still to be done."""
        with self._lock:
            if not self._running and (self._known is None or self._known[0] != self._clock.generation):
                self._running = True
                threading.Thread(target=self._compute, name="tensorfork-digest", daemon=True).start()

    def ask(self, generation: int, answer: SendReply) -> None:
        """Answer with those of a lease's generation, now or when they are there; or that it is over."""
        with self._lock:
            known = self._known
            if known is None or known[0] != generation:
                known = None
                self._waiting.append((generation, answer))
        if known is not None:
            answer(messages.Digests(known[0], len(known[1])), known[1])
        elif generation != self._clock.generation:
            self._answer()
        else:
            self.begin()

    def close(self) -> None:
        """Stop computing soon."""
        self._cancel.set()

    def _compute(self) -> None:
        cuda.relax_capture()
        more = True
        while more and not self._cancel.is_set():
            failed = None
            try:
                self._compute_once()
            except Exception as error:
                log.exception("computing the digests failed")
                failed = f"the seed could not compute its digests: {error}"
            more = self._answer(done=True, failed=failed)

    def _compute_once(self) -> None:
        generation = self._clock.generation
        if self._checksums is None:
            self._checksums = DigestBatch.of(self._tensors)
        with streams.on_side_streams({tensor.device for tensor in self._tensors.values()}):
            found = {} if generation % 2 else self._checksums.compute(self._stop(generation), gentle=True)
        if len(found) == len(self._tensors) and self._clock.generation == generation:
            self._known = generation, tables.pack_digests([found[name] for name in self._tensors])
            self.computed += 1

    def _answer(self, *, done: bool = False, failed: str | None = None) -> bool:
        """Answer whoever can be; `done` says that a computation has ended, `failed` why in vain. True if another is to
        begin: somebody waits for digests of the generation as it is now.
        """
        with self._lock:
            known, now = self._known, self._clock.generation
            fresh = failed is not None or (known is not None and known[0] == now)
            left = [] if fresh else [one for one in self._waiting if one[0] == now]
            ready = [one for one in self._waiting if one not in left]
            self._waiting = left
            if done:
                self._running = bool(left)
        for generation, answer in ready:
            if known is not None and known[0] == generation:
                answer(messages.Digests(generation, len(known[1])), known[1])
            elif generation != now or failed is None:
                answer(
                    messages.Refused(messages.CHANGED, "the seed's weights changed while their digests were computed")
                )
            else:
                answer(messages.Refused(messages.BUSY, failed))
        return bool(left)

    def _stop(self, generation: int) -> Callable[[], bool]:
        return lambda: self._cancel.is_set() or self._clock.generation != generation
