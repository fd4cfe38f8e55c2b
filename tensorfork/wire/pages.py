"""Pages: parts of a table that travel behind a reply, as named columns.

A page is a map in msgpack from the name of a column to its values, one for each row. It holds a bounded number of rows,
so that packing, sending or reading one never holds the interpreter for long. Columns that are not known are skipped: a
later release may send some (docs/decisions.md, "Additions to the wire").
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import msgpack

from tensorfork.patience import Check, looking
from tensorfork.wire.messages import MAX_MESSAGE, MOST_BYTES, MOST_BYTES_A_ROW, unpack

PAGE = 500
"""Rows in one page: packed in well under a millisecond."""

_REQUIRED: Any = object()

T = TypeVar("T")


class Column(NamedTuple):
    """A column that is known: its name, what checks and converts all of its values, and the value where it is absent.

    Without a default it must be there.
    """

    name: str
    read: Callable[[list[Any]], Sequence[Any]]
    default: Any = _REQUIRED


def paged(rows: Iterable[T]) -> Iterator[list[T]]:
    """The rows of each page."""
    iterator = iter(rows)
    while page := list(islice(iterator, PAGE)):
        yield page


def pack_pages(rows: Iterable[T], columns: Callable[[list[T]], Mapping[str, Sequence[Any]]]) -> list[bytes]:
    """Pages of these rows. `columns` gives the columns of some of them.

    Rows that are so long that a page would have more than `MAX_MESSAGE` bytes, as of very long names, lie in more.
    """
    pages: list[bytes] = []
    waiting = list(paged(rows))[::-1]
    while waiting:
        some = waiting.pop()
        packed = msgpack.packb(columns(some))
        if len(packed) > MAX_MESSAGE and len(some) > 1:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]
        else:
            pages.append(packed)
    return pages


def read_pages(
    pages: Sequence[bytes], columns: Sequence[Column], make: Callable[..., Iterable[T]], most: int, check: Check
) -> Iterator[T]:
    """What `make` makes of the columns of each page, in their order. `check` is called before each page.

    Raises `ValueError` for more than `most` rows, or more bytes than so many may have, and for what is no page.
    """
    nbytes, most_bytes = sum(map(len, pages)), MOST_BYTES + MOST_BYTES_A_ROW * most
    if nbytes > most_bytes:
        raise ValueError(f"it has {nbytes:,} bytes, and may have {most_bytes:,} for {most:,} rows")
    total = 0
    for page in looking(pages, check, 1):
        found = _read_page(page, columns)
        total += len(found[0])
        if total > most:
            raise ValueError(f"it has more than {most:,} rows")
        yield from make(*found)


def _read_page(page: bytes, columns: Sequence[Column]) -> list[Sequence[Any]]:
    if len(page) > MAX_MESSAGE:
        raise ValueError(f"a page has {len(page):,} bytes; it may have {MAX_MESSAGE:,}")
    table = unpack(page)
    if type(table) is not dict:
        raise ValueError("a page is no map of columns")
    found = {column.name: table[column.name] for column in columns if column.name in table}
    if missing := [one.name for one in columns if one.name not in found and one.default is _REQUIRED]:
        raise ValueError(f"a page lacks the column {missing[0]!r}")
    if any(type(values) is not list for values in found.values()) or len(set(map(len, found.values()))) != 1:
        raise ValueError("its columns are no lists of one length")
    rows = len(next(iter(found.values())))
    return [one.read(found[one.name]) if one.name in found else [one.default] * rows for one in columns]
