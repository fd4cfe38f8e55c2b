"""Matching our tensors with the seed's: pairs, or one error with every difference. Pure: no memory, no sockets."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from attrs import evolve

from tensorfork.errors import LayoutMismatch
from tensorfork.fork.pairs import Pair, Run, extent_of_pair, runs_of_pair
from tensorfork.fork.suggested_rename import SuggestedRename, suggest_rename
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.patience import Check, looking, unchecked

MAX_RUNS_COMPARED = 1 << 18
"""Runs of all tensors that are compared, at most, to tell whether interleaved ones really overlap."""


def match(
    theirs: ModelLayout,
    ours: ModelLayout,
    renamed: Mapping[str, str] | None = None,
    check: Check = unchecked,
) -> list[Pair]:
    """Pair every tensor of ours with the seed's of the same name, or of the one that `renamed` has for ours.

    In the pairs both have our name: nothing behind this knows of another.

    One on the meta device may differ in its stride: with its memory it takes the seed's, if nothing but its ties lies
    in its storage. Not so the shard of a `DTensor`, since the whole has a stride as well.

    Raises `LayoutMismatch` with every tensor that only one side has, that differs, or that shares memory with another
    one here as the seed's two do not.
    """
    their_tensors = {tensor.name: tensor for tensor in theirs.tensors}
    our_tensors = {tensor.name: tensor for tensor in ours.tensors}
    matched = {name: their_tensors[name] for name in our_tensors if name in their_tensors}
    wanted: Collection[str] = our_tensors
    if renamed:
        names = {name: renamed.get(name, name) for name in our_tensors}
        there = {name: their_tensors[other] for name, other in names.items() if other in their_tensors}
        matched = {name: tensor if name == tensor.name else evolve(tensor, name=name) for name, tensor in there.items()}
        wanted = frozenset(names.values())
    pairs = [Pair(tensor, our_tensors[name]) for name, tensor in matched.items()]
    differences = [(pair, why) for pair in looking(pairs, check) if (why := pair.theirs.difference(pair.ours))]
    mismatched = _mismatched(differences, pairs, ours, check)
    differing = {name for name, _ in mismatched}
    mismatched += _conflicts([pair for pair in pairs if pair.name not in differing], check)
    missing = [name for name in our_tensors if name not in matched]
    unexpected = [name for name in their_tensors if name not in wanted]
    if missing or unexpected or mismatched:
        suggested = None if renamed else _suggested(our_tensors, their_tensors, missing, unexpected, check)
        raise LayoutMismatch(
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            left_out=frozenset(theirs.left_out),
            sought=renamed or {},
            renamed={} if suggested is None else suggested.pairs,
            advice="" if suggested is None else str(suggested),
        )
    return pairs


def _suggested(
    ours: Mapping[str, TensorLayout],
    theirs: Mapping[str, TensorLayout],
    missing: Sequence[str],
    unexpected: Sequence[str],
    check: Check,
) -> SuggestedRename | None:
    """The `rename=` for names that differ by wrappers alone, if there are such."""

    def same(name: str, other: str) -> bool:
        one, two = ours[name], theirs[other]
        return (one.dtype, one.shape, one.placement) == (two.dtype, two.shape, two.placement)

    return suggest_rename(ours, missing, unexpected, same, check)


def _mismatched(
    differences: Sequence[tuple[Pair, str]], pairs: Sequence[Pair], ours: ModelLayout, check: Check
) -> list[tuple[str, str]]:
    """The names of those among pairs that differ which cannot be filled, each with the reason in words."""
    on_meta = {i for i, storage in enumerate(ours.storages) if storage.device == "meta"}
    changed = {pair.ours.storage for pair, _ in differences} & on_meta
    sharing: dict[int, dict[object, Pair]] = defaultdict(dict)
    for pair in pairs if changed else ():
        if pair.ours.storage in changed:
            sharing[pair.ours.storage].setdefault(_change(pair), pair)
    mismatched = []
    for pair, why in looking(differences, check):
        if pair.ours.storage in on_meta and _differ_in_stride(pair) and pair.ours.placement is None:
            first_two = islice(sharing[pair.ours.storage].items(), 2)
            other = next((one for change, one in first_two if change != _change(pair)), None)
            if other is None:
                continue
            why += f"; it shares memory with {other.name} here, so it cannot take the seed's stride"
        mismatched.append((pair.name, why))
    return mismatched


def _differ_in_stride(pair: Pair) -> bool:
    """Whether two tensors that are not equal differ in nothing but their stride."""
    return evolve(pair.ours, stride=pair.theirs.stride) == pair.theirs


def _change(pair: Pair) -> tuple[object, ...]:
    """Equal for tensors of ours that are the same elements in one order, and will be with the seed's strides."""
    ours = pair.ours
    return ours.storage, ours.offset, ours.dtype, ours.shape, ours.stride, pair.theirs.stride


def _conflicts(pairs: Sequence[Pair], check: Check) -> list[tuple[str, str]]:
    """Tensors that share bytes here which are different bytes in the seed, each with the reason in words."""
    suspects: dict[str, Pair] = {}
    in_storage = Counter(pair.ours.storage for pair in pairs)
    pairs = [pair for pair in pairs if in_storage[pair.ours.storage] > 1]  # few, in most models
    by_name = {pair.name: pair for pair in pairs}
    order = {name: i for i, name in enumerate(by_name)}
    for one, other in _clashes([extent_of_pair(pair) for pair in pairs if pair.ours.numel], check):
        suspects[one.name], suspects[other.name] = by_name[one.name], by_name[other.name]
    if not suspects:
        return []
    limit = MAX_RUNS_COMPARED // len(suspects)
    exact = [run for pair in looking(suspects.values(), check) for run in runs_of_pair(pair, limit)]
    shared: dict[str, str] = {}
    for one, other in _clashes(exact, check):
        earlier, later = sorted((one.name, other.name), key=order.__getitem__)
        shared[later] = earlier
    return [
        (later, f"shares memory with {earlier} here, and not so in the seed; untie them, or tie the seed's")
        for later, earlier in sorted(shared.items())
    ]


def _clashes(runs: Sequence[Run], check: Check) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs that overlap in one of our storages and come from different bytes of the seed's.

    As many steps as there are pairs that overlap: a seed may say that what is one tensor here is many there.
    """
    open_runs: list[Run] = []
    # the order depends on nothing that the seed's allocator chose, so that the error is the same each time
    for run in looking(sorted(runs, key=lambda one: (one.storage, one.start, one.end, one.name)), check, 1):
        open_runs = [one for one in open_runs if one.storage == run.storage and one.end > run.start]
        for one in open_runs:
            if (one.source, one.shift) != (run.source, run.shift):
                yield one, run
        # of runs that come from the same bytes, the one that ends last is enough
        same = [one for one in open_runs if (one.source, one.shift) == (run.source, run.shift)]
        if all(one.end < run.end for one in same):
            open_runs = [one for one in open_runs if one not in same] + [run]
