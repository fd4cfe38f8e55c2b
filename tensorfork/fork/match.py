"""Match: our tensors with the seed's, or one error with every difference. Pure: nothing here touches memory or a socket."""

from collections.abc import Iterator, Sequence

from tensorfork.errors import LayoutMismatch
from tensorfork.fork.pairs import Pair, Run, extent_of_pair, runs_of_pair
from tensorfork.layout import ModelLayout

MAX_RUNS_COMPARED = 1 << 18
"""How many stretches are looked at to tell whether interleaved tensors really overlap."""


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


def _conflicts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Tensors that share memory here, and not (or not so) in the seed: no bytes could be right for both."""
    suspects: dict[str, Pair] = {}
    by_name = {pair.name: pair for pair in pairs}
    order = {name: i for i, name in enumerate(by_name)}
    for one, other in _clashes([extent_of_pair(pair) for pair in pairs if pair.ours.numel]):
        suspects[one.name], suspects[other.name] = by_name[one.name], by_name[other.name]
    if not suspects:
        return []
    exact = [run for pair in suspects.values() for run in runs_of_pair(pair, MAX_RUNS_COMPARED)]
    clashing = [sorted((one.name, other.name), key=order.__getitem__) for one, other in _clashes(exact)]
    return sorted(
        {
            later: f"shares memory with {earlier} here, and not so in the seed; untie them, or tie the seed's"
            for earlier, later in clashing
        }.items()
    )


def _clashes(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs that meet in one of our storages and want different bytes there."""
    reaching: list[Run] = []
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
