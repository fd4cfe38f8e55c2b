"""Plain values that are written into a model, together with its tensors' memory or not at all."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import frozen

from tensorfork.model.entries import dictionary_of
from tensorfork.model.kinds import Classifier
from tensorfork.model.values import Place


@frozen(eq=False, repr=False)
class ValueWrite:
    """A value that is to be written, and the one that is there. Both are C functions that run no Python code."""

    do: Callable[[], object]
    undo: Callable[[], object]


def prepare_write(place: Place | None, new: Any) -> ValueWrite | str:
    """How a value is written where another was read; or why it cannot be, in words. Nothing is written yet."""
    if place is None:
        return "it is held by a function, or cannot be written to"
    owner, key, is_attribute = place
    read_and_write = _attribute(owner, key) if is_attribute else _item(owner, key)
    if isinstance(read_and_write, str):
        return read_and_write
    read, write = read_and_write
    try:
        return ValueWrite(partial(write, new), partial(write, read()))
    except (AttributeError, LookupError):
        return "it is not there any more"


_Access = tuple[Callable[[], Any], Callable[[Any], object]]


def _attribute(owner: Any, key: str) -> _Access | str:
    cls = type(owner)
    if _is_frozen(cls):
        return f"its {cls.__name__} is frozen"
    fields = Classifier().fields_of(cls)
    held: Any = dictionary_of(owner, fields)
    if key in held:
        return _item(held, key)
    slot = dict(fields[1])[key]
    return partial(slot.__get__, owner), partial(slot.__set__, owner)


def _item(owner: Any, key: Any) -> _Access | str:
    kinds: tuple[Any, ...] = (dict, list, deque)
    for kind in kinds:
        if issubclass(type(owner), kind):
            return partial(kind.__getitem__, owner, key), partial(kind.__setitem__, owner, key)
    return f"a {type(owner).__name__} cannot be written to"


def _is_frozen(cls: type) -> bool:
    """Whether dataclasses or attrs have made its instances unchangeable."""
    inherited: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        inherited.update(vars(base))
    parameters, setattr_ = inherited.get("__dataclass_params__"), inherited["__setattr__"]
    return bool(getattr(parameters, "frozen", False)) or getattr(setattr_, "__name__", "") == "_frozen_setattrs"
