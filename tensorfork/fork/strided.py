"""Strided tensors, whose elements lie in too many runs to be fetched one by one.

They are fetched with their gaps, slab by slab, into scratch of bounded size, and their elements are copied from there
into place, so that the gaps in our memory stay as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from threading import Event

import torch
from attrs import frozen

from tensorfork.fork.pairs import Pair
from tensorfork.layout import TensorLayout
from tensorfork.patience import Check, looking, unchecked
from tensorfork.regions import Copy, Place, Region
from tensorfork.runs import grid_of, max_runs, runs_of
from tensorfork.transports.base import Session

SCRATCH = 16 << 20
"""Bytes of scratch, at most, on each device that needs any."""
_FIRST_ID = 1 << 31
"""The id of the first scratch region, above that of any storage."""
_Grid = Sequence[tuple[int, int]]
"""As in `grid_of`: (step in bytes, size) for each dimension, longest step first."""


@frozen(eq=False, repr=False)
class Scratch:
    """Buffers for slabs, by device."""

    buffers: Mapping[torch.device, torch.Tensor]

    @classmethod
    def for_tensors(cls, tensors: Sequence[tuple[TensorLayout, torch.device]], check: Check = unchecked) -> "Scratch":
        """Scratch for these tensors with gaps, each given with its device. Tensors of few runs need none."""
        sizes: dict[torch.device, int] = {}
        limit = max_runs(len(tensors))
        for tensor, device in looking(tensors, check):
            if len(runs_of(tensor, limit)) > limit:
                sizes[device] = min(SCRATCH, max(sizes.get(device, 0), tensor.extent))
        return cls({on: torch.empty(nbytes, dtype=torch.uint8, device=on) for on, nbytes in sizes.items()})

    @property
    def regions(self) -> list[Region]:
        """One region for each buffer."""
        return [
            Region(_FIRST_ID + i, buffer.data_ptr(), buffer.nbytes, str(device), buffer)
            for i, (device, buffer) in enumerate(self.buffers.items())
        ]

    def place(self, device: torch.device, ours: Mapping[int, Place]) -> Place:
        """The place of a device's buffer in the transport's regions, of which `ours` has all places by id."""
        return ours[_FIRST_ID + list(self.buffers).index(device)]


def pull_strided(
    session: Session,
    pair: Pair,
    tensor: torch.Tensor,
    theirs: Mapping[int, Place],
    ours: Mapping[int, Place],
    scratch: Scratch,
    deadline: float,
    cancel: Event,
) -> None:
    """Fill one strided tensor. Raises what `Session.pull` raises; slabs that were filled before stay filled."""
    buffer, into = scratch.buffers[tensor.device], scratch.place(tensor.device, ours)
    place = theirs[pair.theirs.storage]
    start = tensor.storage_offset() * tensor.element_size()
    length, steps = grid_of(pair.ours)
    for offset, grid, piece in _slabs(length, steps, buffer.nbytes):
        nbytes = _extent(piece, grid)
        source = place.offset + pair.theirs.offset + offset
        copy = Copy(0, place.region, source, into.region, into.offset, nbytes)
        session.pull([copy], deadline, lambda _: None, cancel)
        shape = [size for _, size in grid] + [piece]
        stride = [step for step, _ in grid] + [1]
        with torch.inference_mode():
            destination = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            destination.set_(tensor.untyped_storage(), start + offset, shape, stride)
            destination.copy_(buffer.as_strided(shape, stride))
            if tensor.is_cuda:  # before the transport writes to the scratch again, on another stream
                torch.cuda.current_stream(tensor.device).synchronize()


def _slabs(length: int, grid: _Grid, room: int) -> Iterator[tuple[int, _Grid, int]]:
    """Cut a grid of runs of `length` bytes into slabs that have at most `room` bytes, gaps included.

    Yields each slab's offset, its grid, and the bytes of its runs. No two runs of a slab overlap, since a GPU copies
    them in any order.
    """
    if not grid:
        for start in range(0, length, room):
            yield start, (), min(room, length - start)
        return
    (step, size), inner = grid[0], grid[1:]
    within = _extent(length, inner)
    if within <= room and _without_overlaps(length, grid):
        count = 1 + (room - within) // step
        for first in range(0, size, count):
            yield first * step, ((step, min(count, size - first)), *inner), length
    else:
        for i in range(size):
            for offset, part, piece in _slabs(length, inner, room):
                yield i * step + offset, part, piece


def _without_overlaps(length: int, grid: _Grid) -> bool:
    return all(step >= _extent(length, grid[i + 1 :]) for i, (step, _) in enumerate(grid))


def _extent(length: int, grid: _Grid) -> int:
    return length + sum(step * (size - 1) for step, size in grid)
