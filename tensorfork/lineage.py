"""Which weights a seed holds: a version.

`Seed.generation` counts changes within one process. A version can be compared between processes: it has the id of its
lineage, which begins where weights are loaded and which forks inherit, and counts the changes since.
"""

import os
from typing import Any

from attrs import field, frozen

from tensorfork.validators import MAX_TEXT, check_encodable, natural_field, optional_text_field, text_field


@frozen
class Version:
    """A version of a model's weights.

    Attributes:
        lineage: a random id, begun by `publish` and inherited by forks; versions of two lineages have no order.
        counter: how often the weights have changed since the lineage began.
        label: what `Seed.updating(version=)` or `publish(version=)` called it, such as ``step-1200``; None without one.
        content: one digest over all tensors' names and digests, as 32 hexadecimal digits; None where it is not known,
            since it is computed with the digests, when a fork first verifies. It says that two hold the same bytes.
    """

    lineage: str = field(validator=text_field)
    counter: int = field(validator=natural_field)
    label: str | None = field(default=None, validator=optional_text_field)
    content: str | None = field(default=None, validator=optional_text_field)

    @classmethod
    def first(cls, label: str | None = None) -> "Version":
        """The first version of a new lineage."""
        return cls(os.urandom(16).hex(), 0, label)

    def __str__(self) -> str:
        name = f"{self.lineage[:8]}.{self.counter}"
        return f"{name} ({self.label})" if self.label is not None else name


Wanted = Version | str | None
"""What `version=` of a fork takes: a version, or a label."""

AtLeast = Version | int | None
"""What `at_least=` of a fork takes: a version, or a counter of any lineage."""


def why_not_wanted(found: Version, wanted: Wanted, at_least: AtLeast) -> str | None:
    """Why a version is not what a fork asked for, in words; None if it is.

    A version's `content` is compared where both sides know it.
    """
    if isinstance(wanted, str) and found.label != wanted:
        return f"version {wanted!r} was asked for, and the seed has {found}"
    if isinstance(wanted, Version):
        if (found.lineage, found.counter) != (wanted.lineage, wanted.counter):
            return f"version {wanted} was asked for, and the seed has {found}"
        if None not in (found.content, wanted.content) and found.content != wanted.content:
            return (
                f"version {wanted} was asked for with the content {wanted.content}, and the seed's is {found.content}"
            )
    if isinstance(at_least, Version) and found.lineage != at_least.lineage:
        return f"at least version {at_least} was asked for, and the seed's {found} is of another lineage"
    least: Any = at_least.counter if isinstance(at_least, Version) else at_least
    if least is not None and found.counter < least:
        return f"at least version {at_least} was asked for, and the seed has {found}"
    return None


def check_label(label: Any) -> None:
    """Raise for what is no label, and not None: `ValueError` for a text that cannot be sent, else `TypeError`."""
    if label is not None and not isinstance(label, str):
        raise TypeError(f"version must be a Version or a label, not {type(label).__name__}")
    check_encodable("version", label)
    if label is not None and len(label) > MAX_TEXT:
        raise ValueError(f"version must be a label of at most {MAX_TEXT} characters, not of {len(label):,}")


def check_wanted(wanted: Any, at_least: Any) -> None:
    """Raise `TypeError` or `ValueError` for what `version=` and `at_least=` of a fork do not take."""
    if not isinstance(wanted, Version):
        check_label(wanted)
    if not isinstance(at_least, Version | int | None) or isinstance(at_least, bool):
        raise TypeError(f"at_least must be a Version or a counter, not {type(at_least).__name__}")
    if isinstance(at_least, int) and at_least < 0:
        raise ValueError(f"at_least must be a Version or a counter from 0 on, not {at_least}")
