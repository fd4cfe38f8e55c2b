"""The fork's digests, computed while bytes still arrive.

The tensors are divided into parts, in the order in which their bytes come. When the last copy of a part has arrived, a
thread digests the part, on streams of its own, while the next parts are transferred; at the end only the last part is
left to compute. Tensors on the CPU are digested at the end, because digests and sockets would share its cores.
"""

import queue
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import torch
from attrs import define

from tensorfork.digest import warm_up
from tensorfork.digest.batch import DigestBatch
from tensorfork.errors import ForkCancelled
from tensorfork.layout import TensorLayout
from tensorfork.memory import cuda, streams
from tensorfork.regions import Copy, Place

PARTS = 8

MIN_PART_BYTES = 512 << 20
"""Bytes of a part, at least: fewer are not worth waking the thread."""


@define(eq=False, repr=False)
class _Part:
    names: list[str]
    missing: int
    """Copies that have not arrived."""
    first: int
    last: int
    """The range of its copies, last excluded."""


class ArrivalDigests:
    """The digests of tensors whose bytes are arriving. Call `arrived` for each copy, then `digests`, then `close`.

    Args:
        tensors: by name; they are filled by `copies`.
        layouts: of these tensors, in storages of ours.
        ours: where each of these storages begins.
        copies: sorted by where they go (`into`, `at`).
        cancel: set to stop; `digests` then raises `ForkCancelled`.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layouts: Sequence[TensorLayout],
        ours: Mapping[int, Place],
        copies: Sequence[Copy],
        cancel: threading.Event | None = None,
    ) -> None:
        self._tensors = tensors
        self._cancel = threading.Event() if cancel is None else cancel
        warm_up.wait({tensor.device for tensor in tensors.values()})
        self._parts = _divide(tensors, layouts, ours, copies)
        self._first_copies = [part.first for part in self._parts]
        in_parts = {name for part in self._parts for name in part.names}
        self._at_end = [name for name in tensors if name not in in_parts]
        self._ready: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._digests: dict[str, int] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tensorfork-verify", daemon=True)
        if self._parts:
            self._thread.start()

    def arrived(self, i: int) -> None:
        """Record that copy i arrived."""
        at = bisect_right(self._first_copies, i) - 1
        while at >= 0 and self._parts[at].first <= i < self._parts[at].last:  # a copy may reach into two parts
            part = self._parts[at]
            part.missing -= 1
            if not part.missing:
                self._ready.put(at)
            at -= 1

    def digests(self) -> dict[str, int]:
        """The digest of every tensor. Called once all bytes have arrived; raises what the thread met."""
        at_end = {name: self._tensors[name] for name in self._at_end}
        with streams.on_side_streams({tensor.device for tensor in at_end.values()}):
            self._digests |= DigestBatch.of(at_end).compute(self._stopped)
        self._join_thread()
        if self._cancel.is_set():
            raise ForkCancelled("the fork was cancelled (at step digests)")
        if self._error is not None:
            raise self._error
        return self._digests

    def close(self) -> None:
        """Stop the thread, whatever it has left to do."""
        self._closed = True
        self._join_thread()

    def _stopped(self) -> bool:
        return self._closed or self._cancel.is_set()

    def _join_thread(self) -> None:
        if self._thread.is_alive():
            self._ready.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            cuda.relax_capture()
            batches = [DigestBatch.of({name: self._tensors[name] for name in part.names}) for part in self._parts]
            with streams.on_side_streams({tensor.device for tensor in self._tensors.values()}):
                while (at := self._ready.get()) is not None:
                    self._digests |= batches[at].compute(self._stopped)
        except BaseException as error:  # raised by `digests`
            self._error = error


def _divide(
    tensors: Mapping[str, torch.Tensor],
    layouts: Sequence[TensorLayout],
    ours: Mapping[int, Place],
    copies: Sequence[Copy],
) -> list[_Part]:
    """The dense tensors on GPUs, in the order of the copies that fill them, in parts of about equal size."""
    placed = []
    for layout in layouts:
        if tensors[layout.name].is_cuda and layout.numel and layout.is_dense:
            place = ours[layout.storage]
            placed.append(((place.region, place.offset + layout.offset), layout))
    placed.sort(key=lambda item: item[0])
    size = max(MIN_PART_BYTES, sum(layout.nbytes for _, layout in placed) // PARTS)
    starts = [(copy.into, copy.at) for copy in copies]
    parts: list[_Part] = []
    filled = size
    for (region, at), layout in placed:
        first = max(0, bisect_right(starts, (region, at)) - 1)
        last = bisect_left(starts, (region, at + layout.nbytes))
        if filled >= size:
            parts.append(_Part([], 0, first, last))
            filled = 0
        parts[-1].names.append(layout.name)
        parts[-1].last = max(parts[-1].last, last)
        filled += layout.nbytes
    for part in parts:
        part.missing = part.last - part.first
    return parts
