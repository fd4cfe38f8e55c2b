"""The argument `rename=`: from what we call a tensor to what the seed calls it. Pure."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Rename = Mapping[str, str] | Callable[[str], str] | None
"""What `rename=` takes: beginnings of our names and what takes their place, or a function from a name to the seed's."""

Namer = Callable[[str], str]
"""Gives the seed's name for one of ours."""


def namer(rename: Rename) -> Namer:
    """The function from a name of ours to the seed's that `rename` stands for. One for all names, of values too.

    A key of a mapping stands for the beginning of a name, up to a dot, to the name's end, or to a dot or bracket that
    follows; the empty key for the beginning of every name. In it ``*`` stands for one part of the name, without dots,
    and each ``*`` of its value for the same text, in order. Of several keys that fit, the one that takes most of the
    name counts, and of those the one with fewer ``*``. What fits no key stays as it is.

    Raises `TypeError` or `ValueError` for what `rename=` does not take. The function raises `ValueError` where a
    function of the caller's fails, and `TypeError` where it returns no text.
    """
    if rename is None:
        return lambda name: name
    if isinstance(rename, Mapping):
        return PrefixRules(rename)
    if not callable(rename):
        raise TypeError(f"rename must be a mapping of names' beginnings, or a function, not {type(rename).__name__}")
    return _checked(rename)


def object_in_seed(name_of: Namer, name: str) -> str:
    """The seed's name for an object of ours, or a value: as the names below it begin there. Raises as `name_of` does.

    So ``layers.0`` is ``layers.0._orig_mod`` where each tensor below is renamed so, and ``layers.0._orig_mod`` is
    ``layers.0`` where that part is removed.
    """
    try:
        below = name_of(f"{name}.")
    except (TypeError, ValueError):  # a function that knows whole names alone
        below = ""
    return below[:-1] if below.endswith(".") else name_of(name)


def _checked(function: Callable[[str], str]) -> Namer:
    def name_in_seed(name: str) -> str:
        try:
            renamed: Any = function(name)
        except Exception as error:
            raise ValueError(f"rename= failed for {name!r}: {type(error).__name__}: {error}") from error
        if not isinstance(renamed, str):
            raise TypeError(f"rename= must return a name (str); for {name!r} it returned {renamed!r:.200}")
        return renamed

    return name_in_seed


class PrefixRules:
    """The function that a mapping stands for."""

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self._rules: list[tuple[re.Pattern[str], str]] = []
        items: list[tuple[Any, Any]] = list(mapping.items())
        for key, value in items:
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"rename= must map names (str) to names; it has {key!r}: {value!r}")
            if value.count("*") > key.count("*"):
                raise ValueError(f"rename={{{key!r}: {value!r}}} has more * in the value than in the key")
            boundary = "" if not key or key.endswith(".") else r"(?=[.\[]|\Z)"
            text = "([^.]+)".join(map(re.escape, key.split("*")))
            self._rules.append((re.compile(text + boundary), value))
        self._rules.sort(key=lambda rule: rule[0].groups)

    def __call__(self, name: str) -> str:
        """See `namer`."""
        found = [(match, value) for pattern, value in self._rules if (match := pattern.match(name)) is not None]
        if not found:
            return name
        match, value = max(found, key=lambda one: one[0].end())  # of equal ones the first, which has fewer *
        parts = iter(match.groups())
        return "".join(_filled(value, parts)) + name[match.end() :]


def _filled(value: str, parts: Iterator[str]) -> Iterator[str]:
    for character in value:
        yield next(parts) if character == "*" else character
