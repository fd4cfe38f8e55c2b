"""Values that are not the seed's: in words, for the report, and as writes, for those that are taken over."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from attrs import frozen

from tensorfork.errors import ValueMismatch
from tensorfork.model.value_kinds import Array, Named
from tensorfork.model.value_writes import ValueWrite, prepare_write
from tensorfork.model.values import Collection, Place
from tensorfork.report import DifferentValues

ABSENT: Final = object()
"""Stands for the value that one side does not have."""
MAX_SHOWN = 60
"""Characters of one value in words."""
MAX_BITS_SHOWN = 1000
"""Bits of an integer that is shown in digits. Python refuses to make them for integers of thousands of digits."""
MAX_REFUSED = 10
"""Values in the message of one error."""
_INDICES = re.compile(r"""\[(?:'[^']*'|"[^"]*"|[^\[\]]*)\]""")


@frozen(eq=False, repr=False)
class Difference:
    """A value that is not the seed's.

    Attributes:
        name: ours, or the seed's for what we do not have.
        theirs: the seed's value as it travels, or `ABSENT`.
        ours: our value, or `ABSENT`.
        place: where ours was read; None where that is no place of its own.
    """

    name: str
    theirs: Any
    ours: Any
    place: Place | None


def by_attribute(differences: Iterable[Difference]) -> tuple[DifferentValues, ...]:
    """Group the differences by the last part of their names."""
    groups: dict[str, list[Difference]] = {}
    for one in differences:
        groups.setdefault(_attribute(one.name), []).append(one)
    return tuple(
        DifferentValues(attribute, tuple(one.name for one in some), _seed_text(some[0]), _our_text(some[0]))
        for attribute, some in groups.items()
    )


def prepare_writes(differences: Sequence[Difference], peer: str) -> list[ValueWrite]:
    """How these values of ours become the seed's. Raises `ValueMismatch` with all of those that cannot be."""
    prepared = {one.name: _write(one) for one in differences}
    if refused := {name: why for name, why in prepared.items() if isinstance(why, str)}:
        shown = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:MAX_REFUSED])
        more = f"; and {len(refused) - MAX_REFUSED:,} more" if len(refused) > MAX_REFUSED else ""
        raise ValueMismatch(
            f"{peer}: {len(refused):,} values cannot be taken over from the seed: {shown}{more}. Nothing was copied. "
            "Recompute them after the fork, and leave them out of take=",
            names=list(refused),
        )
    return [write for write in prepared.values() if not isinstance(write, str)]


def _write(one: Difference) -> ValueWrite | str:
    """The write; or why it cannot be, in words."""
    if one.theirs is ABSENT:
        return "the seed has none"
    if one.ours is ABSENT:
        return "there is none here to be written to"
    new = complex(*one.theirs) if isinstance(one.theirs, list) else one.theirs
    if type(new) not in (bool, int, float, complex):
        return "only numbers and bools can be taken, and the seed has something else"
    return prepare_write(one.place, new)


def _seed_text(one: Difference) -> str:
    value = one.theirs
    if value is ABSENT:
        return "none"
    if isinstance(value, bytes):
        return "one" if one.ours is ABSENT else "another"
    return repr(complex(*value) if isinstance(value, list) else value)[:MAX_SHOWN]


def _our_text(one: Difference) -> str:
    """A text of ours may be a secret, and goes to a log: it is not shown."""
    match one.ours:
        case str() | bytes():
            return f"a {'text' if isinstance(one.ours, str) else 'row of bytes'} of {len(one.ours):,}"
        case Named():
            return one.ours.text[:MAX_SHOWN]
        case Collection():
            return f"{len(one.ours.entries):,} entries"
        case Array():
            return f"an array {list(one.ours.shape)} of {one.ours.dtype}"
        case int() if one.ours.bit_length() > MAX_BITS_SHOWN:
            return f"an integer of {one.ours.bit_length():,} bits"
    return "none" if one.ours is ABSENT else str(one.ours)[:MAX_SHOWN]


def _attribute(name: str) -> str:
    """The last part of a name, without indices, and not a number."""
    parts = [part for part in _INDICES.sub("", name).split(".") if part and not part.isdigit()]
    return parts[-1] if parts else name
