"""What our tensors are called in the seed, and which of the seed's tensors our selection takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from tensorfork.fork.rename import Namer, PrefixRules
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.model.selection import Selection


@frozen(eq=False, repr=False)
class SeedNames:
    """What our tensors are called in the seed.

    Attributes:
        renamed: by our names, the seed's, where they differ.
        selection: ours, in our names.
    """

    renamed: Mapping[str, str]
    selection: Selection
    _wanted: frozenset[str] = frozenset()
    """The seed's names of the tensors that we fill."""
    _left_out: Mapping[str, str] = {}
    """By the seed's name, our name for each tensor that our selection leaves out."""

    @classmethod
    def of(cls, ours: ModelLayout, selection: Selection, name_of: Namer | None) -> "SeedNames":
        """The seed's names for these tensors, and for those that the selection left out of them.

        `name_of` gives them; None where they are ours. Raises `ValueError` where two different tensors of ours have one
        name there, and as `name_of` does.
        """
        if name_of is None:
            return cls({}, selection)
        names = {tensor.name: name_of(tensor.name) for tensor in ours.tensors}
        _check_distinct(ours.tensors, names)
        left_out = {name_of(name): name for name in ours.left_out}
        renamed = {name: there for name, there in names.items() if name != there}
        if isinstance(
            name_of, PrefixRules
        ):  # what only the seed has is chosen by our patterns as it is called here, too
            selection = evolve(
                selection,
                include=_patterns(selection.include, name_of),
                exclude=_patterns(selection.exclude, name_of),
            )
        return cls(renamed, selection, frozenset(names.values()), left_out)

    def selects(self, name: str) -> bool:
        """Whether a tensor of the seed, by its name there, is one of those that our selection takes.

        Of a tensor that we have, our name decides; of any other its own.
        """
        if name in self._wanted:
            return True
        return name not in self._left_out and self.selection.selects(name)

    def ours(self, name: str) -> str:
        """Our name for a tensor of the seed's that our selection leaves out; the seed's own if we have none."""
        return self._left_out.get(name, name)


def _patterns(patterns: Sequence[str] | None, name_of: Namer) -> Sequence[str] | None:
    return None if patterns is None else tuple(dict.fromkeys([*patterns, *map(name_of, patterns)]))


def _check_distinct(tensors: Sequence[TensorLayout], names: Mapping[str, str]) -> None:
    """Raise `ValueError` where two of our tensors, which are not one, have one name in the seed."""
    first: dict[str, TensorLayout] = {}
    for tensor in tensors:
        other = first.setdefault(names[tensor.name], tensor)
        if other is not tensor and _place(other) != _place(tensor):
            raise ValueError(
                f"rename= gives {other.name!r} and {tensor.name!r} one name in the seed, {names[tensor.name]!r}, and "
                "they are two tensors"
            )


def _place(tensor: TensorLayout) -> tuple[Any, ...]:
    return tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride
