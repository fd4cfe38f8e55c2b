"""From two layouts to copies. Pure: nothing here touches memory or a socket.

`match` pairs our tensors with the seed's, or says everything that differs. `cut` turns the pairs into copies, once both
sides' regions are known: every destination byte exactly once, neighbours merged, nothing across a region's edge, and no
piece longer than the transport likes.
"""

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from attrs import frozen

from tensorfork.errors import LayoutMismatch
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.transports.base import Copy, Place

MAX_RUNS = 1024
"""A tensor in more stretches than this is fetched with its gaps, and copied into place on our side."""
MAX_RUNS_COMPARED = 1 << 18
"""How many stretches are looked at to tell whether interleaved tensors really overlap."""


@frozen
class Pair:
    """One of our tensors, and the seed's that fills it."""

    theirs: TensorLayout
    ours: TensorLayout

    @property
    def name(self) -> str:
        """The name both have."""
        return self.ours.name


@frozen
class Plan:
    """What to fetch: `copies`, straight into place, in the order of our memory; then `strided`, in too many stretches
    for that.
    """

    copies: tuple[Copy, ...]
    strided: tuple[Pair, ...]


class _Run(NamedTuple):
    """A stretch of one of our storages, and where in theirs its bytes are. A tuple: there are many, to be sorted."""

    storage: int
    start: int
    end: int
    source: int
    shift: int
    """Their offset less ours."""
    name: str


def match(theirs: ModelLayout, ours: ModelLayout) -> list[Pair]:
    """Pair every tensor of ours with the seed's of that name.

    Raises `LayoutMismatch` naming every tensor that only one side has, that differs, or that cannot share memory here
    because the seed's do not.
    """
    known = {tensor.name: tensor for tensor in theirs.tensors}
    wanted = {tensor.name: tensor for tensor in ours.tensors}
    pairs = [Pair(known[name], tensor) for name, tensor in wanted.items() if name in known]
    mismatched = [(pair.name, why) for pair in pairs if (why := pair.theirs.difference(pair.ours))]
    differing = {name for name, _ in mismatched}
    mismatched += _conflicts([pair for pair in pairs if pair.name not in differing])
    missing = [name for name in wanted if name not in known]
    unexpected = [name for name in known if name not in wanted]
    if missing or unexpected or mismatched:
        raise LayoutMismatch(
            missing=missing, unexpected=unexpected, mismatched=mismatched, left_out=frozenset(theirs.left_out)
        )
    return pairs


def cut(pairs: Sequence[Pair], theirs: Mapping[int, Place], ours: Mapping[int, Place], piece: int) -> Plan:
    """The copies that fill all pairs. `theirs` and `ours` say where each storage lies in the transport's regions."""
    direct: list[_Run] = []
    strided: list[Pair] = []
    for pair in pairs:
        found = _few_runs(pair, MAX_RUNS)
        if len(found) <= MAX_RUNS:
            direct += found
        else:
            strided.append(pair)
    runs = _merge(direct)
    covered = _Cover(runs)
    places = {_place(pair): pair for pair in reversed(strided) if not covered.holds(_extent(pair))}  # ties have one
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


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What these (start, end) hold together: in order, what touches or overlaps as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def grid_of(tensor: TensorLayout) -> tuple[int, list[tuple[int, int]]]:
    """A tensor's bytes as a grid of equal stretches: the bytes of one, and the (step in bytes, size) of each dimension
    along which it is repeated, longest step first. What touches or overlaps is one stretch.
    """
    length = tensor.torch_dtype.itemsize
    steps: list[tuple[int, int]] = []
    for step, size in sorted(zip(tensor.stride, tensor.shape, strict=True)):
        step *= tensor.torch_dtype.itemsize
        if size == 1 or step == 0:
            continue
        if step <= length:
            length += (size - 1) * step
            continue
        for i, (inner, count) in enumerate(steps):
            if step % inner == 0 and step // inner <= count:  # both together reach every multiple of the inner step
                steps[i] = inner, count + step // inner * (size - 1)
                break
        else:
            steps.append((step, size))
    return length, steps[::-1]


def runs_of(tensor: TensorLayout, limit: int) -> list[tuple[int, int]]:
    """The stretches of memory that a tensor's elements fill, as (offset from its first byte, bytes), merged where they
    touch. Where there are more than `limit` before they are merged, `limit` + 1 of them as they are.
    """
    if tensor.is_dense:
        return [(0, tensor.nbytes)] if tensor.numel else []
    length, steps = grid_of(tensor)
    offsets: set[int] = set()
    for offset in _offsets(steps):
        offsets.add(offset)
        if len(offsets) > limit:
            return [(offset, length) for offset in sorted(offsets)]
    found: list[tuple[int, int]] = []
    for offset in sorted(offsets):
        if found and found[-1][0] + found[-1][1] >= offset:
            start = found[-1][0]
            found[-1] = (start, max(found[-1][1], offset + length - start))
        else:
            found.append((offset, length))
    return found


def _offsets(steps: Sequence[tuple[int, int]]) -> Iterator[int]:
    if not steps:
        yield 0
        return
    step, size = steps[0]
    for i in range(size):
        for inner in _offsets(steps[1:]):
            yield i * step + inner


def _few_runs(pair: Pair, limit: int) -> list[_Run]:
    ours, theirs = pair.ours, pair.theirs
    storage, start, source, shift, name = (
        ours.storage,
        ours.offset,
        theirs.storage,
        theirs.offset - ours.offset,
        ours.name,
    )
    return [_Run(storage, start + at, start + at + n, source, shift, name) for at, n in runs_of(ours, limit)]


def _extent(pair: Pair) -> _Run:
    shift = pair.theirs.offset - pair.ours.offset
    start = pair.ours.offset
    return _Run(pair.ours.storage, start, start + pair.ours.extent, pair.theirs.storage, shift, pair.name)


def _place(pair: Pair) -> tuple[object, ...]:
    ours, theirs = pair.ours, pair.theirs
    return ours.storage, ours.offset, ours.dtype, ours.shape, ours.stride, theirs.storage, theirs.offset


def _conflicts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Tensors that share memory here, and not (or not so) in the seed: no bytes could be right for both."""
    suspects: dict[str, Pair] = {}
    by_name = {pair.name: pair for pair in pairs}
    order = {name: i for i, name in enumerate(by_name)}
    for one, other in _clashes([_extent(pair) for pair in pairs if pair.ours.numel]):
        suspects[one.name], suspects[other.name] = by_name[one.name], by_name[other.name]
    if not suspects:
        return []
    exact = [run for pair in suspects.values() for run in _few_runs(pair, MAX_RUNS_COMPARED)]
    clashing = [sorted((one.name, other.name), key=order.__getitem__) for one, other in _clashes(exact)]
    return sorted(
        {
            later: f"shares memory with {earlier} here, and not so in the seed; untie them, or tie the seed's"
            for earlier, later in clashing
        }.items()
    )


def _clashes(runs: Sequence[_Run]) -> Iterator[tuple[_Run, _Run]]:
    """Pairs of runs that meet in one of our storages and want different bytes there."""
    reaching: list[_Run] = []
    # by what does not depend on where the seed's allocator put things
    for run in sorted(runs, key=lambda one: (one.storage, one.start, one.end, one.name)):
        reaching = [one for one in reaching if one.storage == run.storage and one.end > run.start]
        for one in reaching:
            if (one.source, one.shift) != (run.source, run.shift):
                yield one, run
        # of runs that want the same, the one that reaches farthest stands for all
        same = [one for one in reaching if (one.source, one.shift) == (run.source, run.shift)]
        if all(one.end < run.end for one in same):
            reaching = [one for one in reaching if one not in same] + [run]


def _merge(runs: Sequence[_Run]) -> list[_Run]:
    """The union of runs that do not conflict: sorted, and none overlapping another."""
    merged: list[_Run] = []
    for run in sorted(runs):
        last = merged[-1] if merged else None
        if last and last.storage == run.storage and last.end > run.start:
            if run.end > last.end:
                merged[-1] = _Run(last.storage, last.start, run.end, last.source, last.shift, last.name)
        else:
            merged.append(run)
    return merged


class _Cover:
    """Which stretches of our storages are fetched, and from where."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._by_storage: dict[int, list[_Run]] = defaultdict(list)
        for run in runs:
            self._by_storage[run.storage].append(run)

    def holds(self, run: _Run) -> bool:
        at, runs = run.start, self._by_storage[run.storage]
        for i in range(max(0, bisect_right(runs, at, key=lambda one: one.start) - 1), len(runs)):
            one = runs[i]
            if not one.start <= at < one.end or (one.source, one.shift) != (run.source, run.shift):
                return False
            at = one.end
            if at >= run.end:
                return True
        return False


def _copy(run: _Run, theirs: Place, ours: Place) -> Copy:
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
