"""Which tensors a caller chooses, by patterns over their names."""

import re
from collections.abc import Sequence

from attrs import field, frozen

from tensorfork.validators import check_encodable

Patterns = str | Sequence[str] | None


def _patterns(given: Patterns) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if type(pattern) is not str or not pattern:
            raise TypeError(f"include, exclude and the like must be names or patterns of names, not {pattern!r}")
        check_encodable("a pattern of include and exclude", pattern)
    return patterns


@frozen
class Selection:
    """The tensors that are included, all by default, less those that are excluded.

    A pattern is a name in which ``*`` stands for any text and ``?`` for one character; every other character stands for
    itself, brackets too. It matches that name and every name under it: ``layers.3`` is the whole layer, ``*.kv_cache``
    every cache and all tensors in it.

    Attributes:
        include: patterns, of which a tensor's name must match one; None for all.
        exclude: patterns, of which it must match none.
    """

    include: tuple[str, ...] | None = field(default=None, converter=_patterns)
    exclude: tuple[str, ...] | None = field(default=None, converter=_patterns)
    _included: re.Pattern[str] | None = field(init=False, repr=False, eq=False)
    _excluded: re.Pattern[str] | None = field(init=False, repr=False, eq=False)

    @_included.default
    def _compile_include(self) -> re.Pattern[str] | None:
        return None if self.include is None else _regex(self.include)

    @_excluded.default
    def _compile_exclude(self) -> re.Pattern[str] | None:
        return _regex(self.exclude) if self.exclude else None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self._included is None and self._excluded is None

    def excludes(self, name: str) -> bool:
        """Whether this name, and with it every name under it, is excluded."""
        return self._excluded is not None and self._excluded.fullmatch(name) is not None

    def selects(self, name: str) -> bool:
        """Whether the tensor of this name is one of those chosen."""
        return (self._included is None or self._included.fullmatch(name) is not None) and not self.excludes(name)

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The patterns of `include` that match none of these names."""
        return [pattern for pattern in self.include or () if not any(map(_regex([pattern]).fullmatch, names))]


def _regex(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(?s:(?:{'|'.join(map(_text_of, patterns))})(?:[.\[].*)?)")


def _text_of(pattern: str) -> str:
    """A pattern as a regular expression.

    What stands between two * is sought where it comes first and nowhere else, by an atomic group: that is enough, and
    a name that a seed made for it costs no more than its length squared.
    """
    first, *others = ("".join("." if one == "?" else re.escape(one) for one in part) for part in pattern.split("*"))
    return first + "".join(f"(?>.*?{part})" for part in others[:-1]) + "".join(f".*{part}" for part in others[-1:])
