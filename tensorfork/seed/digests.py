"""A seed's digests: computed when first asked for, once a generation, on a thread of their own."""

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
    """The digests of all tensors, at the seed's current generation."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], seqlock: SeqLock) -> None:
        self._tensors, self._seqlock = tensors, seqlock
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, SendReply]] = []
        self._cached: tuple[int, list[bytes]] | None = None
        self._batch: DigestBatch | None = None
        self._running = False
        self._cancel = threading.Event()
        self.computed = 0

    def start(self) -> None:
        """Start computing the current generation's digests, unless they are there or being computed."""
        with self._lock:
            if not self._running and (self._cached is None or self._cached[0] != self._seqlock.generation):
                self._running = True
                threading.Thread(target=self._run, name="tensorfork-digest", daemon=True).start()

    def request(self, generation: int, reply: SendReply) -> None:
        """Reply with the digests of a generation, now or when they are computed.

        The reply is `Refused` when the generation is over, or when they cannot be computed.
        """
        with self._lock:
            cached = self._cached
            if cached is None or cached[0] != generation:
                cached = None
                self._waiting.append((generation, reply))
        if cached is not None:
            reply(messages.Digests(cached[0], len(cached[1])), cached[1])
        elif generation != self._seqlock.generation:
            self._reply_to_waiting()
        else:
            self.start()

    def close(self) -> None:
        """Cancel the computation; its thread ends soon after."""
        self._cancel.set()

    def _run(self) -> None:
        cuda.relax_capture()
        again = True
        while again and not self._cancel.is_set():
            failure = None
            try:
                self._compute()
            except Exception as error:
                log.exception("computing the digests failed")
                failure = f"the seed could not compute its digests: {error}"
            again = self._reply_to_waiting(computation_ended=True, failure=failure)

    def _compute(self) -> None:
        """Compute the current generation's digests, and cache them unless it changes meanwhile."""
        generation = self._seqlock.generation
        if self._batch is None:
            self._batch = DigestBatch.of(self._tensors)
        with streams.on_side_streams({tensor.device for tensor in self._tensors.values()}):
            found = {} if generation % 2 else self._batch.compute(self._cancelled_at(generation), gentle=True)
        if len(found) == len(self._tensors) and self._seqlock.generation == generation:
            self._cached = generation, tables.pack_digests([found[name] for name in self._tensors])
            self.computed += 1

    def _reply_to_waiting(self, *, computation_ended: bool = False, failure: str | None = None) -> bool:
        """Reply to every waiting request that can be answered now. True if another computation is needed.

        That is so when a request waits for the current generation, whose digests are neither cached nor impossible to
        compute; `failure` says why they are.
        """
        with self._lock:
            cached, current = self._cached, self._seqlock.generation
            settled = failure is not None or (cached is not None and cached[0] == current)
            still_waiting = [] if settled else [one for one in self._waiting if one[0] == current]
            ready = [one for one in self._waiting if one not in still_waiting]
            self._waiting = still_waiting
            if computation_ended:
                self._running = bool(still_waiting)
        for generation, reply in ready:
            if cached is not None and cached[0] == generation:
                reply(messages.Digests(generation, len(cached[1])), cached[1])
            elif generation != current or failure is None:
                reason = "the seed's weights changed while their digests were computed"
                reply(messages.Refused(messages.CHANGED, reason))
            else:
                reply(messages.Refused(messages.BUSY, failure))
        return bool(still_waiting)

    def _cancelled_at(self, generation: int) -> Callable[[], bool]:
        return lambda: self._cancel.is_set() or self._seqlock.generation != generation
