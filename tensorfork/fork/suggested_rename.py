"""Which `rename=` would make the names of two models equal, where they differ by wrappers. Pure.

torch.compile, DDP, FSDP, activation checkpointing and classes around a whole model put a part of their own into the
names below them: ``_orig_mod.``, ``module.``, ``language_model.``. What is found is any such part, known or not, at the
front of names or within them, on either side.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from attrs import frozen

from tensorfork.fork.rename import namer
from tensorfork.patience import Check, looking, unchecked

KNOWN_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Parts of names that are wrappers wherever they stand, also where both sides have them."""

MAX_RULES = 6
"""Beginnings of names in a suggested mapping, at most: beyond, nobody reads it."""
MAX_NAMES = 250_000
"""Names of both sides that are looked at, at most: so many take some seconds."""
_SAMPLES, _CANDIDATES, _FURTHER_PARTS = 32, 4, 3

_NUMBER = re.compile(r"(?:(?<=[.\[])|^)\d+(?=[.\]]|$)")


@frozen
class SuggestedRename:
    """What would make names equal.

    Attributes:
        pairs: by our names, the seed's that they are then.
        here: what stands in our names alone, with its dots.
        there: what stands in the seed's names alone.
        argument: the ``rename=`` to give, as Python's source; None where no short one was found.
    """

    pairs: Mapping[str, str]
    here: Sequence[str]
    there: Sequence[str]
    argument: str | None

    def __str__(self) -> str:
        sides = ((self.here, "in this model"), (self.there, "in the seed's"))
        where = " and ".join(f"{_listed(parts)} {side}" for parts, side in sides if parts)
        wrappers = "wrapper" if len(self.here) + len(self.there) == 1 else "wrappers"
        unsure = ", if these are the same" if self.here and self.there else ""
        advice = self.argument or "a function from our names to the seed's"
        return f"the {wrappers} {where}: give rename={advice} to fork_into{unsure}"


def suggest_rename(
    ours: Iterable[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
    same: Callable[[str, str], bool],
    check: Check = unchecked,
) -> SuggestedRename | None:
    """A suggestion for as many of these names as differ by wrappers alone; None for none, or for too many names.

    Args:
        ours: all names of ours.
        missing: those of them that the seed does not have.
        unexpected: the seed's that we do not have.
        same: whether a tensor of ours, by its name, is one of the seed's but for the name.
        check: called every so often.
    """
    if not missing or not unexpected or len(missing) + len(unexpected) > MAX_NAMES:
        return None
    missing, unexpected = _Watched(missing, check), _Watched(unexpected, check)
    here, there = _exclusive_parts(missing, unexpected), _exclusive_parts(unexpected, missing)
    pairs = _equal_without(missing, unexpected, here, there, same)
    parts_here = _parts_in(pairs, here)
    parts_there = _parts_in(pairs.values(), there)
    absent, taken = frozenset(missing), frozenset(pairs.values())
    kept = [name for name in ours if name not in absent]
    front = _equal_but_for_front(
        _Watched([name for name in missing if name not in pairs], check),
        _Watched([name for name in unexpected if name not in taken], check),
        same,
        may_replace=not pairs and not kept,
    )
    if front is not None:
        before, after, further = front
        pairs |= further
        parts_here += [before] * bool(before)
        parts_there += [after] * bool(after)
    if not pairs:
        return None
    goal = _Goal(pairs, kept, [name for name in missing if name not in pairs], check)
    return SuggestedRename(pairs, parts_here, parts_there, _argument(goal, parts_here, parts_there))


class _Watched(Sequence[str]):
    """Names, in which every loop looks whether it should go on."""

    def __init__(self, names: Sequence[str], check: Check) -> None:
        self._names, self._check = names, check

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: Any) -> Any:
        return self._names[at]

    def __iter__(self) -> Iterator[str]:
        return looking(self._names, self._check, 16)


# Pairs of names.


def _exclusive_parts(names: Sequence[str], others: Sequence[str]) -> frozenset[str]:
    """The parts that stand in these names and not in the others, but for numbers and what stands last."""
    found = {part for name in names for part in name.split(".")[:-1] if not part.isdecimal()}
    return frozenset(found - {part for name in others for part in name.split(".")}) | KNOWN_WRAPPERS


def _equal_without(
    missing: Sequence[str],
    unexpected: Sequence[str],
    here: frozenset[str],
    there: frozenset[str],
    same: Callable[[str, str], bool],
) -> dict[str, str]:
    """The pairs of names that are equal without these parts, and equal to no other's.

    Unknown parts on both sides are no wrappers: one of two modules was taken for the other.
    """
    ours, theirs = _without(missing, here), _without(unexpected, there)
    pairs = {}
    for stripped, name in ours.items():
        other = theirs.get(stripped)
        if name is not None and other is not None and same(name, other):
            if not (_has(name, here - KNOWN_WRAPPERS) and _has(other, there - KNOWN_WRAPPERS)):
                pairs[name] = other
    return pairs


def _has(name: str, parts: frozenset[str]) -> bool:
    return not parts.isdisjoint(name.split(".")[:-1])


def _without(names: Sequence[str], parts: frozenset[str]) -> dict[str, str | None]:
    """The names by what they are without these parts; None where that is so of several."""
    found: dict[str, str | None] = {}
    for name in names:
        *above, last = name.split(".")
        stripped = ".".join([*(part for part in above if part not in parts), last])
        found[stripped] = None if stripped in found else name
    return found


def _parts_in(names: Iterable[str], parts: frozenset[str]) -> list[str]:
    """Those of the parts that stand in the names, in order."""
    return [
        f"{part}." for part in dict.fromkeys(part for name in names for part in name.split(".")[:-1] if part in parts)
    ]


def _equal_but_for_front(
    missing: Sequence[str], unexpected: Sequence[str], same: Callable[[str, str], bool], *, may_replace: bool
) -> tuple[str, str, dict[str, str]] | None:
    """A beginning of our names, what takes its place in the seed's, and the pairs that this makes; None without.

    `may_replace` is whether something may stand in either, which must make a pair of each name then: one of two modules
    is not to be taken for the other.
    """
    known = frozenset(unexpected)
    best: tuple[str, str, dict[str, str]] | None = None
    for (before, after), _ in _front_candidates(missing, unexpected).most_common(_CANDIDATES):
        renamed = ((name, after + name[len(before) :]) for name in missing if name.startswith(before))
        pairs = {name: other for name, other in renamed if other in known and same(name, other)}
        if before and after and not (may_replace and len(pairs) == len(missing) == len(unexpected)):
            continue
        if pairs and (best is None or len(pairs) > len(best[2])):
            best = before, after, pairs
    return best


def _front_candidates(missing: Sequence[str], unexpected: Sequence[str]) -> Counter[tuple[str, str]]:
    """How often each two beginnings are all that a sample of our names differs by from one of the seed's."""
    sample = missing[:: max(1, len(missing) // _SAMPLES)]
    ends = {end for name in sample for end, _ in _ends(name)}
    fronts: dict[str, list[str]] = {}
    for name in unexpected:
        for end, front in _ends(name):
            if end in ends and len(listed := fronts.setdefault(end, [])) < _SAMPLES:
                listed.append(front)
    found: Counter[tuple[str, str]] = Counter()
    for name in sample:
        end, front = next(((end, front) for end, front in _ends(name) if end in fronts), ("", ""))
        found.update((front, other) for other in fronts.get(end, ()))
    return found


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """The ends of a name that begin with a part, the longest first, each with what stands before it."""
    at = 0
    while True:
        yield name[at:], name[:at]
        at = name.find(".", at) + 1
        if not at:
            return


# The argument.


@frozen(eq=False)
class _Goal:
    """What a `rename=` is to do.

    Attributes:
        pairs: by our names, the seed's that they are to be.
        kept: our names that the seed has, which are to stay.
        others: our names that the seed does not have in any case.
        check: called every so often.
    """

    pairs: Mapping[str, str]
    kept: Sequence[str]
    others: Sequence[str]
    check: Check

    def reached_by(self, rename: Callable[[str], str]) -> bool:
        """Whether a function does that, and gives no two names one."""
        pairs = looking(self.pairs.items(), self.check)
        if any(rename(name) != there for name, there in pairs) or any(rename(n) != n for n in self.kept):
            return False
        taken = {*self.pairs.values(), *self.kept}
        return len(taken | {rename(name) for name in self.others}) == len(taken) + len(self.others)


def _argument(goal: _Goal, here: Sequence[str], there: Sequence[str]) -> str | None:
    """The source of a `rename=` that reaches the goal: a mapping, or the removal of parts where that is shorter."""
    mapping = _mapping(goal)
    if mapping is not None and len(mapping) <= 2:
        return repr(mapping)

    def without(name: str) -> str:
        for part in here:
            name = name.replace(part, "")
        return name

    if not there and len(here) <= 2 and goal.reached_by(without):
        return "lambda name: name" + "".join(f".replace({part!r}, '')" for part in here)
    return None if mapping is None else repr(mapping)


def _mapping(goal: _Goal) -> dict[str, str] | None:
    """A mapping of at most `MAX_RULES` beginnings, as short as will do; None without one."""
    for further in range(_FURTHER_PARTS + 1):
        for generalised in (_any_number, _as_it_is):
            rules = _rules(goal.pairs, further, generalised)
            if rules is not None and goal.reached_by(namer(rules)):
                return rules
            if rules is not None:  # names that are to stay may be exceptions
                rename = namer(rules)
                rules |= dict(islice((generalised(n, n) for n in goal.kept if rename(n) != n), MAX_RULES * 100))
                if len(rules) <= MAX_RULES and goal.reached_by(namer(rules)):
                    return rules
    return None


def _rules(
    pairs: Mapping[str, str], further: int, generalised: Callable[[str, str], tuple[str, str]]
) -> dict[str, str] | None:
    """The beginnings that the pairs differ by, with so many parts more; None for too many, or no mapping."""
    rules: dict[str, str] = {}
    for name, other in pairs.items():
        before, after = generalised(*_fronts(name, other, further))
        if rules.setdefault(before, after) != after or len(rules) > MAX_RULES:
            return None
    return rules


def _fronts(name: str, other: str, further: int) -> tuple[str, str]:
    """What stands before the end that two names have in common, and so many parts more; in both."""
    one, two = name.split("."), other.split(".")
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    common -= further
    if common <= 0:
        return name, other
    return _front(one[: len(one) - common]), _front(two[: len(two) - common])


def _front(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _as_it_is(before: str, after: str) -> tuple[str, str]:
    return before, after


def _any_number(before: str, after: str) -> tuple[str, str]:
    """Two beginnings with a * for each number, where the numbers in both are the same."""
    if _NUMBER.findall(before) != _NUMBER.findall(after) or "*" in before + after:
        return before, after
    return _NUMBER.sub("*", before), _NUMBER.sub("*", after)


def _listed(parts: Sequence[str]) -> str:
    listed = ", ".join(map(repr, parts[:3]))
    return listed + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
