"""Records as plain values and back: the declared fields, each of exactly its declared type.

Fields that are not declared are skipped: a later release may send some (docs/decisions.md, "Additions to the wire").
For attrs classes whose fields are of plain types, records, dicts of these by name, or None. cattrs does this and far
more; importing it, and having it compile code for each record, would take a third of the time of `import tensorfork`.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Any, cast, get_args, get_origin

from attrs import fields, has

Reader = Callable[[Any], Any]


class Record:
    """Base of records: equality and text by fields, without code that attrs would compile for each class."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return _values(self) == _values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        values = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(cast(Any, type(self))))
        return f"{type(self).__name__}({', '.join(values)})"


def to_plain(record: Any) -> dict[str, Any]:
    """A record's fields by name, and those of the records in it."""
    return {one.name: _plain(one.type, getattr(record, one.name)) for one in fields(type(record))}


def from_plain(kind: type[Any], values: Any) -> Any:
    """The record with these fields.

    Unknown ones are skipped, those that are missing take their defaults. Raises `ValueError` or `TypeError` where one
    without a default is missing, and where one is of another type, or refused by its validator.
    """
    if type(values) is not dict:
        raise ValueError(f"the fields of a {kind.__name__} expected, {type(values).__name__} came")
    return kind(**{name: read(values[name]) for name, read in _readers(cast(Any, kind)).items() if name in values})


def _values(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, one.name) for one in fields(type(record)))


def _plain(declared: Any, value: Any) -> Any:
    """By the declared type: what a transport puts into a dict of anything is not looked at."""
    if has(declared):
        return to_plain(value)
    if _holds_records(declared):
        return {name: to_plain(one) for name, one in value.items()}
    return value


def _holds_records(declared: Any) -> bool:
    return get_origin(declared) is dict and has(get_args(declared)[1])


@cache
def _readers(kind: type[Any]) -> dict[str, Reader]:
    return {one.name: _reader(one.type) for one in fields(kind)}


def _reader(declared: Any) -> Reader:
    """What checks a value of a declared type."""
    if isinstance(declared, types.UnionType):
        inner = _reader(next(one for one in get_args(declared) if one is not type(None)))
        return lambda value: None if value is None else inner(value)
    if _holds_records(declared):
        kind = get_args(declared)[1]
        return lambda value: {_exactly(str, name): from_plain(kind, one) for name, one in _exactly(dict, value).items()}
    if has(declared):
        return lambda value: from_plain(declared, value)
    expected = get_origin(declared) or declared
    return lambda value: _exactly(expected, value)


def _exactly(expected: type[Any], value: Any) -> Any:
    if type(value) is not expected:
        raise ValueError(f"{expected.__name__} expected, {type(value).__name__} came")
    return value
