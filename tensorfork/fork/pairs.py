"""Our tensors with the seed's that fill them, and the runs of bytes to be copied between the two. Pure."""

from typing import NamedTuple

from attrs import frozen

from tensorfork.fork.runs import runs_of
from tensorfork.layout import TensorLayout


@frozen
class Pair:
    """One of our tensors, and the seed's that fills it."""

    theirs: TensorLayout
    ours: TensorLayout

    @property
    def name(self) -> str:
        """The name that both have."""
        return self.ours.name


class Run(NamedTuple):
    """A stretch of one of our storages, and where in theirs its bytes are. A tuple: there are many, to be sorted."""

    storage: int
    start: int
    end: int
    source: int
    shift: int
    """Their offset less ours."""
    name: str


def runs_of_pair(pair: Pair, limit: int) -> list[Run]:
    ours, theirs = pair.ours, pair.theirs
    storage, start, source, shift, name = (
        ours.storage,
        ours.offset,
        theirs.storage,
        theirs.offset - ours.offset,
        ours.name,
    )
    return [Run(storage, start + at, start + at + n, source, shift, name) for at, n in runs_of(ours, limit)]


def extent_of_pair(pair: Pair) -> Run:
    shift = pair.theirs.offset - pair.ours.offset
    start = pair.ours.offset
    return Run(pair.ours.storage, start, start + pair.ours.extent, pair.theirs.storage, shift, pair.name)
