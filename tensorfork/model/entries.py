"""How the entries of an object are read, and named, without running code of the model's.

For the walk, which looks for tensors, and for `tensorfork.model.values`, which reads what lies beside them.
"""

import enum
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.kinds import PLAIN_VALUES, Fields

BUILT_IN_COLLECTIONS = (list, tuple, dict, deque, set, frozenset)
"""These have no attributes of their own; subclasses may."""
DTENSOR_INTERNALS = frozenset({"_local_tensor"})
MAX_BITS = 2000
"""Bits of an integer that is named by its digits: Python refuses to make thousands of them."""
_EMPTY: Mapping[str, Any] = {}


def dictionary_of(owner: Any, fields: Fields) -> Mapping[str, Any]:
    """An object's instance dictionary; an empty one where it has none. `fields` are those of its class."""
    return _EMPTY if fields[0] is None else fields[0].__get__(owner)


def slots_of(owner: Any, fields: Fields) -> list[tuple[str, Any]]:
    """The names and values of an object's slots that are set."""
    found = []
    for key, slot in fields[1]:
        try:
            found.append((key, slot.__get__(owner)))
        except AttributeError:
            pass  # it was never set
    return found


def items_of(mapping: Any) -> list[tuple[Any, Any]]:
    """The items of a dict or of a view of one, even where a subclass overrides ``items``."""
    is_view = issubclass(type(mapping), types.MappingProxyType)  # isinstance would read __class__, which may be code
    return list(mapping.items() if is_view else dict.items(mapping))


def inner_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a traceable wrapper subclass is made of, by the names of its attributes.

    Raises `UnsupportedTensor` when it cannot be taken apart.
    """
    try:
        parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {part: getattr(tensor, part) for part in parts}
    except Exception as error:  # the subclass's own code
        raise UnsupportedTensor(f"{name}: this {type(tensor).__name__} cannot be taken apart: {error}") from error
    return {part: value for part, value in inner.items() if isinstance(value, torch.Tensor)}


def elements_of(collection: Any) -> list[Any]:
    """The elements of a list, tuple, deque or set, even where a subclass overrides ``__iter__``."""
    bases: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
    base = next(base for base in bases if issubclass(type(collection), base))
    return list(base.__iter__(collection))


def element_suffixes(sequence: Any, count: int) -> list[str] | None:
    """The names of a named tuple's elements, each with a dot; None for other sequences."""
    fields = getattr(type(sequence), "_fields", ())
    return [f".{one}" for one in fields] if isinstance(fields, tuple) and 0 < len(fields) == count else None


def parent_of(name: str) -> str:
    """The name of what holds the thing of this name."""
    return name[: max(name.rfind("."), name.rfind("["), 0)]


def join(path: str, key: str) -> str:
    """The name of an attribute of what has a name."""
    return f"{path}.{key}" if path else key


def key_text(key: Any) -> str | None:
    """A dict's key as text that is the same in every process; None where it has none."""
    cls = type(key)
    if issubclass(cls, enum.Enum):
        name = object.__getattribute__(key, "__dict__").get("_name_")
        return f"{cls.__name__}.{name}"
    if issubclass(cls, tuple):
        parts = [key_text(part) for part in elements_of(key)]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if cls is int and key.bit_length() > MAX_BITS:
        return hex(key)
    return repr(key) if cls in PLAIN_VALUES else None
