"""A seed's digests: computed when first asked for, once a generation, on a thread of their own."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from attrs import evolve, frozen

from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.content import content_root
from tensorfork.digest.definition import Pieces, roots
from tensorfork.digest.record import Digests
from tensorfork.errors import SeedAsleep, SeedChanged, SeedMoved
from tensorfork.exhaustion import resources
from tensorfork.interpreter import ending
from tensorfork.memory import cuda, streams
from tensorfork.model.modes import in_normal_mode
from tensorfork.seed.published_model import PublishedModel
from tensorfork.seed.refusals import moved
from tensorfork.wire import messages, tables
from tensorfork.wire.listener import SendReply
from tensorfork.wire.refusals import error_of

log = logging.getLogger("tensorfork")

_ASLEEP = "the seed is suspended: its memory may not be there; resume() it first"
_POLL = 0.1
"""Seconds between two checks, while `record` waits, whether the seed was closed."""


_Asked = messages.GetDigests | messages.GetPieces


@frozen(eq=False, repr=False)
class _Computed:
    """The digests of a generation."""

    generation: int
    count: int
    """Of tensors."""
    packed: list[bytes]
    pieces: Mapping[int, Pieces]
    """Those of a tensor's pieces, by its place, unless it has one piece: that has the tensor's digest."""
    content: str

    def answer(self, asked: _Asked) -> tuple[messages.Reply, Sequence[bytes]]:
        """The reply, and the frames behind it."""
        if isinstance(asked, messages.GetDigests):
            return messages.Digests(self.generation, len(self.packed)), self.packed
        if asked.tensors and asked.tensors[-1] >= self.count:
            return messages.Refused(messages.MALFORMED, f"the seed has {self.count} tensors"), ()
        return messages.Pieces(self.generation), [self._packed_pieces(i) for i in asked.tensors]

    def _packed_pieces(self, place: int) -> bytes:
        if place in self.pieces:
            return b"".join(tables.pack_digests(self.pieces[place]))
        return tables.one_digest(self.packed, place)


class DigestCache:
    """The digests of all tensors of a model, at its current generation.

    `wanted` says whether a fork waits for them, or will: their computation is given up when nobody does.
    """

    def __init__(self, model: PublishedModel, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._callers = 0
        """Threads of this process that wait in `record`."""
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, SendReply, _Asked]] = []
        self._cached: _Computed | None = None
        self._batch: tuple[int, DigestBatch] | None = None
        """The number of the publication, and what was prepared for it."""
        self._running: threading.Thread | None = None
        self._cancel = threading.Event()
        self.computed = 0

    def start(self) -> None:
        """Start computing the current generation's digests, unless they are there or being computed.

        Raises RuntimeError, Python's, where there is no thread for it; the next call tries again.
        """
        with self._lock:
            known = self._cached is not None and self._cached.generation == self._model.generation
            if self._running is None and not known and not self._cancel.is_set():
                thread = threading.Thread(target=self._run, name="tensorfork-digest", daemon=True)
                thread.start()
                self._running = thread

    def content(self, generation: int) -> str | None:
        """The root over a generation's digests, as hexadecimal digits; None unless they have been computed."""
        cached = self._cached
        return cached.content if cached is not None and cached.generation == generation else None

    def request(self, generation: int, reply: SendReply, asked: _Asked) -> None:
        """Reply with the digests of a generation that are asked for, now or when they are computed.

        The reply is `Refused` when the generation is over, or when they cannot be computed.
        """
        with self._lock:
            cached = self._cached
            if cached is None or cached.generation != generation:
                cached = None
                self._waiting.append((generation, reply, asked))
        if cached is not None:
            reply(*cached.answer(asked))
        elif generation != self._model.generation:
            self._reply_to_waiting()
        else:
            try:
                self.start()
            except RuntimeError as error:
                log.warning("the digests cannot be computed: %s", error)
                self._reply_to_waiting(failure=_failure(error))

    @in_normal_mode
    @resources()
    def record(self) -> Digests:
        """See `Seed.digests`. Waits until they are computed. Not for the thread that computes them."""
        self._check_open()
        generation, publication = self._model.at_one_moment()
        version = self._model.version
        if self._model.suspended:
            raise SeedAsleep(_ASLEEP)
        if generation % 2 or generation != self._model.generation:
            raise SeedChanged(self._model.why_changing())
        publication.places.check()
        with self._lock:
            self._callers += 1
        try:
            self.start()
            values = self._wait_for(generation, len(publication.tensors))
        finally:
            with self._lock:
                self._callers -= 1
        digests = Digests.of(dict(zip(publication.tensors, values, strict=True)), version, generation)
        return evolve(digests, version=evolve(version, content=digests.content))

    def _check_open(self) -> None:
        if self._cancel.is_set():
            ending.check()
            raise RuntimeError("the seed is closed")

    def _wait_for(self, generation: int, count: int) -> list[int]:
        """The digests of a generation, in the layout's order. Raises what a fork would get."""
        answers: queue.SimpleQueue[tuple[messages.Reply, Sequence[bytes]]] = queue.SimpleQueue()
        asked = messages.GetDigests(b"")
        self.request(generation, lambda answer, frames=(): answers.put((answer, frames)), asked)
        while True:
            try:
                answer, frames = answers.get(timeout=_POLL)
            except queue.Empty:
                self._check_open()
                continue
            if isinstance(answer, messages.Refused):
                raise error_of(answer, answer.reason)
            return tables.unpack_digests(frames, count)

    def close(self) -> None:
        """Cancel the computation; its thread ends soon after, which `wait` waits for."""
        with self._lock:
            self._cancel.set()

    def forget(self) -> None:
        """Drop what refers to a publication that was replaced."""
        self._batch = None

    def wait(self, deadline: float) -> bool:
        """Wait until nothing is computed any more; whether that is so by the deadline.

        The generation must be odd, or the cache closed.
        """
        thread = self._running
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        with ending.guarded():
            self._compute_while_asked()

    def _compute_while_asked(self) -> None:
        cuda.relax_capture()
        again = True
        while again and not self._cancel.is_set():
            failure = None
            try:
                self._compute()
            except SeedMoved as error:
                failure = moved(error)
            except Exception as error:
                log.exception("computing the digests failed")
                failure = _failure(error)
            if self._batch is not None and self._batch[0] != self._model.publication.number:
                self.forget()
            again = self._reply_to_waiting(computation_ended=True, failure=failure)

    def _compute(self) -> None:
        """Compute the current generation's digests, and cache them unless it changes meanwhile.

        Looks at the tensors before and after: in between, their memory may have been freed and used for something else.
        """
        generation, publication = self._model.at_one_moment()
        if generation % 2:
            return
        publication.places.check_memory()
        if self._batch is None or self._batch[0] != publication.number:
            self._batch = publication.number, DigestBatch.of(publication.tensors)
        batch, tensors, checked = self._batch[1], publication.tensors, not publication.stable
        with streams.on_side_streams({tensor.device for tensor in tensors.values()}):
            try:
                found = batch.pieces(self._cancelled_at(generation), gentle=True, checked_reads=checked)
            except Exception:
                publication.places.check_memory()  # which names the tensors
                raise
        if len(found) < len(tensors) or self._model.generation != generation:
            return
        publication.places.check_memory()
        if self._model.generation == generation:
            digests = roots(found)
            packed = tables.pack_digests([digests[name] for name in tensors])
            pieces = {i: found[name] for i, name in enumerate(tensors) if len(found[name]) != 1}
            self._cached = _Computed(generation, len(tensors), packed, pieces, content_root(digests).hex())
            self.computed += 1

    def _reply_to_waiting(self, *, computation_ended: bool = False, failure: messages.Refused | None = None) -> bool:
        """Reply to every waiting request that can be answered now. True if another computation is needed.

        That is so when a request waits for the current generation, whose digests are neither cached nor impossible to
        compute; `failure` says why they are.
        """
        with self._lock:
            cached, current = self._cached, self._model.generation
            settled = failure is not None or (cached is not None and cached.generation == current)
            settled = settled or not (self._callers or self._wanted())  # those that waited have gone
            still_waiting = [] if settled else [one for one in self._waiting if one[0] == current]
            ready = [one for one in self._waiting if one not in still_waiting]
            self._waiting = still_waiting
            if computation_ended and not still_waiting:
                self._running = None
        for generation, reply, asked in ready:
            if cached is not None and cached.generation == generation:
                reply(*cached.answer(asked))
            elif generation != current or failure is None:
                reply(self._why_over())
            else:
                reply(failure)
        return bool(still_waiting)

    def _why_over(self) -> messages.Refused:
        """Why a generation's digests cannot be had any more."""
        if self._model.suspended:
            return messages.Refused(messages.ASLEEP, "the seed was suspended while its digests were computed")
        return messages.Refused(messages.CHANGED, "the seed's weights changed while their digests were computed")

    def _cancelled_at(self, generation: int) -> Callable[[], bool]:
        def cancelled() -> bool:
            if self._cancel.is_set() or self._model.generation != generation:
                return True
            return not self._callers and not self._wanted()

        return cancelled


def _failure(error: Exception) -> messages.Refused:
    return messages.Refused(messages.BUSY, f"the seed could not compute its digests: {error}")
