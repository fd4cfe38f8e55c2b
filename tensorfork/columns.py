"""Whole columns of a table at once: their checks, and frozen objects that are made of columns which were checked.

A fork makes some objects for each of a seed's tensors. One by one, with validators, they cost several times what they
cost by columns.
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

from attrs import fields

from tensorfork.validators import MAX_DIMENSIONS, MAX_TEXT, is_encodable

T = TypeVar("T")


def texts(column: list[Any]) -> list[str]:
    """The column, if it has short texts alone. Raises `ValueError`, as the others here do."""
    _require_type(column, str)
    if max(map(len, column), default=0) > MAX_TEXT:
        raise ValueError(f"a text has more than {MAX_TEXT} characters")
    if not all(map(str.isascii, column)) and not all(map(is_encodable, column)):
        raise ValueError("a text has half of a surrogate pair")
    return column


def naturals(column: list[Any]) -> list[int]:
    """The column, if it has integers from 0 on alone."""
    _require_type(column, int)
    if min(column, default=0) < 0:
        raise ValueError(f"{min(column)} is not a natural number")
    return column


def sizes(column: list[Any]) -> list[tuple[int, ...]]:
    """The column's lists as tuples, if they have integers from 0 on alone, and not too many."""
    _require_type(column, list)
    if max(map(len, column), default=0) > MAX_DIMENSIONS:
        raise ValueError(f"something has more than {MAX_DIMENSIONS} dimensions")
    naturals(list(chain.from_iterable(column)))
    return list(map(tuple, column))


def _require_type(column: list[Any], kind: type[Any]) -> None:
    if others := set(map(type, column)) - {kind}:
        raise ValueError(f"{kind.__name__} expected, {min(one.__name__ for one in others)} came")


def objects_of(kind: type[T], **columns: Sequence[Any]) -> list[T]:
    """Objects of a frozen class of attrs, one for each row of these columns, without its validators and its `__init__`.

    Every field must have its column, those that `__init__` does not take too, and all must be equally long.
    """
    (count,) = {len(column) for column in columns.values()}
    assert columns.keys() == {one.name for one in fields(kind)}  # type: ignore[arg-type]
    made = list(map(object.__new__, repeat(kind, count)))
    for name, column in columns.items():
        deque(map(getattr(kind, name).__set__, made, column), maxlen=0)
    return made
