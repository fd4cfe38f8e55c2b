"""From two layouts to copies. Pure: nothing here touches memory or a socket.

`match` pairs our tensors with the seed's, or says everything that differs. `cut` turns the pairs into copies, once both
sides' regions are known: every destination byte exactly once, neighbours merged, nothing across a region's edge, and no
piece longer than the transport likes.
"""

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from tensorfork.fork.pairs import Pair, Run, extent_of_pair, runs_of_pair
from tensorfork.fork.runs import MAX_RUNS, runs_of, union
from tensorfork.regions import Copy, Place


@frozen
class Plan:
    """What to fetch: `copies`, straight into place, in the order of our memory; then `strided`, in too many stretches
    for that.
    """

    copies: tuple[Copy, ...]
    strided: tuple[Pair, ...]


def cut(pairs: Sequence[Pair], theirs: Mapping[int, Place], ours: Mapping[int, Place], piece: int) -> Plan:
    """The copies that fill all pairs. `theirs` and `ours` say where each storage lies in the transport's regions."""
    direct: list[Run] = []
    strided: list[Pair] = []
    for pair in pairs:
        found = runs_of_pair(pair, MAX_RUNS)
        if len(found) <= MAX_RUNS:
            direct += found
        else:
            strided.append(pair)
    runs = _merge(direct)
    covered = _Cover(runs)
    places = {
        _place(pair): pair for pair in reversed(strided) if not covered.holds(extent_of_pair(pair))
    }  # ties have one
    left = tuple(reversed(places.values()))
    copies = (_copy(run, theirs[run.source], ours[run.storage]) for run in runs)
    return Plan(tuple(part for copy in _join(copies) for part in _pieces(copy, piece)), left)


def complete(pairs: Sequence[Pair], ours: Mapping[int, Place], done: Sequence[Copy]) -> list[str]:
    """The names of the tensors whose every byte the done copies brought."""
    came: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for copy in done:
        came[copy.into].append((copy.at, copy.at + copy.nbytes))
    arrived = {region: union(spans) for region, spans in came.items()}
    return [pair.name for pair in pairs if _arrived(pair, ours, arrived)]


def _place(pair: Pair) -> tuple[object, ...]:
    ours, theirs = pair.ours, pair.theirs
    return ours.storage, ours.offset, ours.dtype, ours.shape, ours.stride, theirs.storage, theirs.offset


def _merge(runs: Sequence[Run]) -> list[Run]:
    """The union of runs that do not conflict: sorted, and none overlapping another."""
    merged: list[Run] = []
    for run in sorted(runs):
        last = merged[-1] if merged else None
        if last and last.storage == run.storage and last.end > run.start:
            if run.end > last.end:
                merged[-1] = Run(last.storage, last.start, run.end, last.source, last.shift, last.name)
        else:
            merged.append(run)
    return merged


class _Cover:
    """Which stretches of our storages are fetched, and from where."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._by_storage: dict[int, list[Run]] = defaultdict(list)
        for run in runs:
            self._by_storage[run.storage].append(run)

    def holds(self, run: Run) -> bool:
        at, runs = run.start, self._by_storage[run.storage]
        for i in range(max(0, bisect_right(runs, at, key=lambda one: one.start) - 1), len(runs)):
            one = runs[i]
            if not one.start <= at < one.end or (one.source, one.shift) != (run.source, run.shift):
                return False
            at = one.end
            if at >= run.end:
                return True
        return False


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
    """Merge copies that are neighbours on both sides."""
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
    if copy.nbytes <= piece:
        yield copy
        return
    for start in range(0, copy.nbytes, piece):
        nbytes = min(piece, copy.nbytes - start)
        yield Copy(0, copy.region, copy.offset + start, copy.into, copy.at + start, nbytes)


def _arrived(pair: Pair, ours: Mapping[int, Place], arrived: Mapping[int, Sequence[tuple[int, int]]]) -> bool:
    if not pair.ours.numel:
        return True
    place = ours[pair.ours.storage]
    first = place.offset + pair.ours.offset
    spans = arrived.get(place.region, ())
    runs = runs_of(pair.ours, MAX_RUNS)
    if len(runs) > MAX_RUNS:
        runs = [(0, pair.ours.extent)]
    return all(_holds(spans, first + at, first + at + nbytes) for at, nbytes in runs)


def _holds(spans: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    at = bisect_right(spans, (start, sys.maxsize)) - 1
    return at >= 0 and spans[at][0] <= start and end <= spans[at][1]
