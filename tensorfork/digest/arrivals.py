"""The fork's digests, computed while bytes still arrive.

The tensors are divided into parts, in the order in which their bytes come. When the last copy of a part has arrived, a
thread digests the part, on streams of its own, while the next parts are transferred; at the end only the last part is
left to compute. Tensors on the CPU are digested at the end, because digests and sockets would share its cores.
"""

import math
import queue
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from attrs import define

from tensorfork.digest import warm_up
from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.definition import Pieces
from tensorfork.errors import ForkCancelled, TransferFailed
from tensorfork.interpreter import ending
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
    """The digests of tensors whose bytes are arriving. Call `arrived` for each copy, then `pieces`, then `close`.

    Args:
        tensors: gives those that are filled by `copies`, by name. The thread calls it, and waits until they are made.
        layouts: of these tensors, in storages of ours.
        devices: those that the tensors are on.
        ours: where each of these storages begins.
        copies: sorted by where they go (`into`, `at`).
        cancel: set to stop; `pieces` then raises `ForkCancelled`.
        deadline: the fork's; `pieces` raises `TransferFailed` then.
    """

    def __init__(
        self,
        tensors: Callable[[], Mapping[str, torch.Tensor]],
        layouts: Sequence[TensorLayout],
        devices: Collection[torch.device],
        ours: Mapping[int, Place],
        copies: Sequence[Copy],
        cancel: threading.Event | None = None,
        deadline: float = math.inf,
    ) -> None:
        self._tensors, self._layouts, self._ours, self._copies = tensors, layouts, ours, copies
        self._devices, self._deadline = devices, deadline
        self._cancel = threading.Event() if cancel is None else cancel
        self._arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._pieces: dict[str, Pieces] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tensorfork-verify", daemon=True)
        if any(device.type == "cuda" for device in devices):
            self._thread.start()

    def arrived(self, i: int) -> None:
        """Record that copy i arrived."""
        self._arrived.put(i)

    def pieces(self) -> dict[str, Pieces]:
        """The digests of every tensor's pieces. Called once all bytes have arrived; raises what the thread met."""
        self._join_thread()
        self._check_cancelled()
        if self._error is not None:
            raise self._error
        at_end = {name: tensor for name, tensor in self._tensors().items() if name not in self._pieces}
        with streams.on_side_streams({tensor.device for tensor in at_end.values()}):
            self._pieces |= DigestBatch.of(at_end).pieces(self._stopped)
        self._check_cancelled()
        return self._pieces

    def close(self) -> None:
        """Stop the thread, whatever it has left to do."""
        self._closed = True
        self._join_thread()

    def _check_cancelled(self) -> None:
        if self._cancel.is_set():
            raise ForkCancelled("the fork was cancelled (at step digests)")
        if time.monotonic() >= self._deadline:
            raise TransferFailed(
                "all bytes had arrived, but not all digests were computed by the deadline: nothing is verified. Fork "
                "with a longer timeout",
                complete=[layout.name for layout in self._layouts],
            )

    def _stopped(self) -> bool:
        return self._closed or self._cancel.is_set() or time.monotonic() >= self._deadline

    def _join_thread(self) -> None:
        if self._thread.is_alive():
            self._arrived.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            with ending.guarded(lambda: self._arrived.put(None)):
                self._digest_parts()
        except BaseException as error:  # raised by `pieces`
            self._error = error

    def _digest_parts(self) -> None:
        cuda.relax_capture()
        warm_up.wait(self._devices)
        tensors = self._tensors()
        parts = _divide(tensors, self._layouts, self._ours, self._copies)
        batches = [DigestBatch.of({name: tensors[name] for name in part.names}) for part in parts]
        with streams.on_side_streams({tensor.device for tensor in tensors.values()}):
            while (i := self._arrived.get()) is not None and not self._stopped():
                for at in _completed(parts, i):
                    self._pieces |= batches[at].pieces(self._stopped)


def _completed(parts: Sequence[_Part], i: int) -> Iterator[int]:
    """Count copy i as arrived; the parts, by number, that are complete with it. A copy may reach into two."""
    at = bisect_right(parts, i, key=lambda part: part.first) - 1
    while at >= 0 and parts[at].first <= i < parts[at].last:
        parts[at].missing -= 1
        if not parts[at].missing:
            yield at
        at -= 1


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
