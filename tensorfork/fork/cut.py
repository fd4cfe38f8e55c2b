"""From pairs of tensors to copies. Pure: no memory, no sockets.

`cut` makes the copies once both sides' regions are known: every destination byte is written exactly once, neighbours
are merged, no copy crosses the edge of a region, and none is longer than the transport wants.
"""

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from tensorfork.fork.pairs import Pair, Run, extent_of_pair, runs_of_pair
from tensorfork.patience import Check, looking, unchecked
from tensorfork.regions import Copy, Place
from tensorfork.runs import max_runs, runs_of, union


@frozen
class Plan:
    """What to fetch.

    Attributes:
        copies: copies straight into place, in the order of our memory.
        strided: tensors of too many runs for that; fetched after the copies, through scratch.
    """

    copies: tuple[Copy, ...]
    strided: tuple[Pair, ...]


def cut(
    pairs: Sequence[Pair],
    theirs: Mapping[int, Place],
    ours: Mapping[int, Place],
    piece: int,
    check: Check = unchecked,
) -> Plan:
    """The plan that fills all pairs.

    `theirs` and `ours` are the storages' places in the transport's regions; `piece` is the longest copy, in bytes.
    """
    direct: list[Run] = []
    strided: list[Pair] = []
    limit = _run_limit(pairs)
    for pair in looking(pairs, check):
        pair_runs = runs_of_pair(pair, limit)
        if len(pair_runs) <= limit:
            direct += pair_runs
        else:
            strided.append(pair)
    runs = _merge(direct)
    covered = _CoveredRanges(runs)
    uncovered = [pair for pair in looking(strided, check) if not covered.contain(extent_of_pair(pair))]
    first_of_ties = {_tie_key(pair): pair for pair in reversed(uncovered)}
    copies = (_copy(run, theirs[run.source], ours[run.storage]) for run in runs)
    pieces = tuple(looking((part for copy in _join(copies) for part in _pieces(copy, piece)), check))
    return Plan(pieces, tuple(reversed(first_of_ties.values())))


def complete(pairs: Sequence[Pair], ours: Mapping[int, Place], done: Sequence[Copy]) -> list[str]:
    """The names of the tensors whose every byte was written by the copies that are done."""
    written: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for copy in done:
        written[copy.into].append((copy.at, copy.at + copy.nbytes))
    arrived = {region: union(spans) for region, spans in written.items()}
    limit = _run_limit(pairs)
    return [pair.name for pair in pairs if _has_arrived(pair, ours, arrived, limit)]


def _run_limit(pairs: Sequence[Pair]) -> int:
    return max_runs(sum(not pair.ours.is_dense for pair in pairs))


def _tie_key(pair: Pair) -> tuple[object, ...]:
    """Equal for tied tensors, which are filled once."""
    ours, theirs = pair.ours, pair.theirs
    return ours.storage, ours.offset, ours.dtype, ours.shape, ours.stride, theirs.storage, theirs.offset


def _merge(runs: Sequence[Run]) -> list[Run]:
    """The union of runs, of which overlapping ones have the same source: sorted, and without overlaps."""
    merged: list[Run] = []
    for run in sorted(runs):
        last = merged[-1] if merged else None
        if last and last.storage == run.storage and last.end > run.start:
            if run.end > last.end:
                merged[-1] = Run(last.storage, last.start, run.end, last.source, last.shift, last.name)
        else:
            merged.append(run)
    return merged


class _CoveredRanges:
    """The ranges of our storages that are copied, and from where. `runs` are sorted, and do not overlap."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._ranges: list[Run] = []
        for run in runs:
            last = self._ranges[-1] if self._ranges else None
            if last and last.end == run.start and _origin(last) == _origin(run):
                self._ranges[-1] = last._replace(end=run.end)
            else:
                self._ranges.append(run)

    def contain(self, run: Run) -> bool:
        """Whether every byte of the run is copied, from the run's own source."""
        at = bisect_right(self._ranges, (run.storage, run.start), key=lambda one: one[:2]) - 1
        if at < 0:
            return False
        return _origin(self._ranges[at]) == _origin(run) and run.end <= self._ranges[at].end


def _origin(run: Run) -> tuple[int, int, int]:
    """Equal for runs of one storage of ours that come from the same bytes where they overlap."""
    return run.storage, run.source, run.shift


def _copy(run: Run, theirs: Place, ours: Place) -> Copy:
    return Copy(
        0,
        theirs.region,
        theirs.offset + run.start + run.shift,
        ours.region,
        ours.offset + run.start,
        run.end - run.start,
    )


def _join(copies: Iterator[Copy]) -> Iterator[Copy]:
    """Sort copies by destination, and merge those that are neighbours on both sides."""
    last: Copy | None = None
    for copy in sorted(copies, key=lambda copy: (copy.into, copy.at)):
        if last and (last.into, last.region) == (copy.into, copy.region):
            if last.at + last.nbytes == copy.at and last.offset + last.nbytes == copy.offset:
                last = Copy(0, last.region, last.offset, last.into, last.at, last.nbytes + copy.nbytes)
                continue
        if last:
            yield last
        last = copy
    if last:
        yield last


def _pieces(copy: Copy, piece: int) -> Iterator[Copy]:
    """Split a copy into pieces of at most `piece` bytes."""
    if copy.nbytes <= piece:
        yield copy
        return
    for start in range(0, copy.nbytes, piece):
        nbytes = min(piece, copy.nbytes - start)
        yield Copy(0, copy.region, copy.offset + start, copy.into, copy.at + start, nbytes)


def _has_arrived(
    pair: Pair, ours: Mapping[int, Place], arrived: Mapping[int, Sequence[tuple[int, int]]], limit: int
) -> bool:
    """Whether every byte of our tensor lies within what has arrived, given as merged (start, end) by region."""
    if not pair.ours.numel:
        return True
    place = ours[pair.ours.storage]
    first = place.offset + pair.ours.offset
    spans = arrived.get(place.region, ())
    runs = runs_of(pair.ours, limit)
    if len(runs) > limit:
        runs = [(0, pair.ours.extent)]
    return all(_contains(spans, first + at, first + at + nbytes) for at, nbytes in runs)


def _contains(spans: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Whether one of the sorted spans contains [start, end)."""
    at = bisect_right(spans, (start, sys.maxsize)) - 1
    return at >= 0 and spans[at][0] <= start and end <= spans[at][1]
