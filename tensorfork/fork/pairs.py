"""Pairs of our tensors and the seed's that fill them, and the runs of bytes to copy for a pair. Pure."""

from typing import NamedTuple

from tensorfork.layout import TensorLayout
from tensorfork.runs import runs_of


class Pair(NamedTuple):
    """One of our tensors, and the seed's that fills it."""

    theirs: TensorLayout
    ours: TensorLayout

    @property
    def name(self) -> str:
        """The name that both have."""
        return self.ours.name


class Run(NamedTuple):
    """A contiguous range of bytes in one of our storages, and where its bytes are in the seed's. Runs sort as tuples.

    Attributes:
        storage: our storage.
        start, end: the range in it.
        source: the seed's storage.
        shift: the offset in the seed's storage less that in ours.
        name: the tensor's.
    """

    storage: int
    start: int
    end: int
    source: int
    shift: int
    name: str


def runs_of_pair(pair: Pair, limit: int) -> list[Run]:
    """The runs of our tensor's elements; more than `limit` as `runs_of` says."""
    ours, theirs = pair.ours, pair.theirs
    storage, start, source = ours.storage, ours.offset, theirs.storage
    shift, name = theirs.offset - ours.offset, ours.name
    return [Run(storage, start + at, start + at + n, source, shift, name) for at, n in runs_of(ours, limit)]


def extent_of_pair(pair: Pair) -> Run:
    """One run from our tensor's first byte to its last, with the gaps between its elements."""
    shift = pair.theirs.offset - pair.ours.offset
    start = pair.ours.offset
    return Run(pair.ours.storage, start, start + pair.ours.extent, pair.theirs.storage, shift, pair.name)
