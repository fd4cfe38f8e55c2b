"""Validators of attrs fields: a value from a caller or a peer must have exactly its declared type, and a bounded size.

attrs calls the functions named `*_field`, with (instance, attribute, value). The others check a value by itself. Those
at the end are for arguments of callers, where any kind of number will do.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeAlias

from attrs import Attribute

MAX_TEXT = 4096
"""Characters of one text."""
MAX_ENTRIES = 256
"""Entries of one mapping."""
MAX_DIMENSIONS = 64

Field: TypeAlias = "Attribute[Any]"


def is_text(value: object) -> bool:
    """Whether it is a str of at most `MAX_TEXT` characters that can be sent."""
    return type(value) is str and len(value) <= MAX_TEXT and is_encodable(value)


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded: not if it has half of a surrogate pair, which `os.fsdecode` may make."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_encodable(name: str, text: object) -> None:
    """Raise `ValueError` for a str that cannot be encoded. `name` says what it is."""
    if isinstance(text, str) and not is_encodable(text):
        raise ValueError(f"{name} has half of a surrogate pair, which is no text that can be sent: {text[:80]!r}")


def is_natural(value: object) -> bool:
    """Whether it is an int of at least 0. A bool is not."""
    return type(value) is int and value >= 0


def text_field(instance: object, attribute: Field, value: object) -> None:
    """Raise `ValueError` unless the value is a short text."""
    if not is_text(value):
        raise ValueError(f"{attribute.name} must be a text of at most {MAX_TEXT} characters, not {str(value)[:80]!r}")


def optional_text_field(instance: object, attribute: Field, value: object) -> None:
    """Raise unless the value is None or a short text: `ValueError` for a text that cannot be sent, else `TypeError`."""
    check_encodable(attribute.name, value)
    if value is not None and not is_text(value):
        raise TypeError(f"{attribute.name} must be a text of at most {MAX_TEXT} characters, not {str(value)[:80]!r}")


def texts_field(instance: object, attribute: Field, value: object) -> None:
    """Raise unless the value maps at most `MAX_ENTRIES` short texts to short texts."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{attribute.name} must map texts to texts, not be {str(value)[:80]!r}")
    if len(value) > MAX_ENTRIES:
        raise ValueError(f"{attribute.name} has {len(value)} entries; {MAX_ENTRIES} at most")
    for key, one in value.items():
        check_encodable(attribute.name, key)
        check_encodable(f"{attribute.name}[{key!r}]", one)
        if not is_text(key) or not is_text(one):
            raise TypeError(f"{attribute.name} must map texts to texts, not {str(key)[:40]!r} to {str(one)[:40]!r}")


def natural_field(instance: object, attribute: Field, value: object) -> None:
    """Raise `ValueError` unless the value is an int of at least 0."""
    if not is_natural(value):
        raise ValueError(f"{attribute.name} must be a natural number, not {str(value)[:80]}")


def is_naturals(value: object) -> bool:
    """Whether it is a tuple of at most `MAX_DIMENSIONS` ints of at least 0."""
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        return False
    for size in value:  # noqa: SIM110  # a generator costs twice as much, and each tensor has two of these tuples
        if type(size) is not int or size < 0:
            return False
    return True


def naturals_field(instance: object, attribute: Field, value: object) -> None:
    """Raise `ValueError` unless the value is a tuple of at most `MAX_DIMENSIONS` ints of at least 0."""
    if not is_naturals(value):
        raise ValueError(f"{attribute.name} must be natural numbers, not {str(value)[:80]}")


def flag(name: str, value: object) -> bool:
    """The value, if it is a bool. Raises `TypeError`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")
    return value


def index_field(instance: object, attribute: Field, value: object) -> None:
    """Raise unless the value is (index, size), two ints with 0 <= index < size."""
    if type(value) is not tuple or len(value) != 2 or not all(type(one) is int for one in value):
        raise TypeError(f"{attribute.name} must be (index, size), not {str(value)[:80]}")
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"{attribute.name} must be (index, size) with an index below the size, not {value}")


# Numbers that callers give.

DAY = 86_400.0
"""Seconds. The longest time that anything of ours can be told to take."""
SHORTEST_STALL = 0.1
"""Seconds. Within a stall a peer is asked several times for a sign of life."""


def seconds(name: str, value: Any, *, zero: bool = False, most: float = DAY) -> float:
    """The time that a caller allows, in seconds: more than 0, or 0 too; and at most `most`, by default a day.

    Raises `TypeError` for what is not a number, `ValueError` for one out of range. Both name the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits; out of range whatever its sign
        number = math.nan
    if not (number <= most and (number > 0.0 or (zero and number == 0.0))):  # nan is neither
        least = "at least 0" if zero else "more than 0"
        at_most = f", and at most {most:,.0f} (a day)" if most == DAY else ""
        raise ValueError(f"{name} is in seconds; it must be {least}{at_most}, not {value}")
    return number


def bytes_a_second(name: str, value: Any) -> float:
    """A rate that a caller gives. Raises `TypeError` for what is no number, `ValueError` unless it is finite and more
    than 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of bytes a second, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not 0.0 < number < math.inf:  # nan is neither
        raise ValueError(f"{name} is in bytes a second, finite and more than 0; not {value}")
    return number


def natural_number(name: str, value: Any) -> int:
    """A count that a caller gives. Raises `TypeError` for what is no integer, `ValueError` for a negative one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
    return int(value)


def positive_number(name: str, value: Any) -> int:
    """A count of at least 1 that a caller gives. Raises as `natural_number` does."""
    if natural_number(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return int(value)


def stall_seconds(name: str, value: Any) -> float:
    """How long a peer may give no sign of life: `SHORTEST_STALL` at least, and at most a day. Raises as `seconds`."""
    if seconds(name, value) < SHORTEST_STALL:
        raise ValueError(f"{name} is in seconds; it must be at least {SHORTEST_STALL}, not {value}")
    return float(value)
