"""Divides copies into batches, and encodes batches for the channel. Pure: nothing here touches memory or a socket.

A two-sided transfer needs both sides to name the same bytes in the same order. The fork decides the order, as a list of
batches, and the seed follows it. A batch is sent and waited for as one: large ranges as they are, or small ones packed
one after another into a bucket.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat

from attrs import frozen

from tensorfork.errors import ProtocolError
from tensorfork.regions import Copy

MAX_RANGES = 1024
"""Byte ranges in one batch, at most."""
FIRST_BYTES, FIRST_RANGES = 512 << 20, 128
"""Bytes and ranges of a group's first batch that is not packed, at most; each batch after it may have twice as many.
While both sides start the first batch, nothing moves, and each range adds 7 us to that; and the first must last until
the second is started, up to 1 ms later, in which 370 MB cross NVLink."""
MAX_PAGE_BYTES = 512 << 10
"""Bytes of batches in one message; a message on a channel has at most 1 MiB."""

ByteRange = tuple[int, int, int]
"""A region's id, an offset in the region, and a number of bytes."""

_HEADER = struct.Struct("<HBxI")
_MAX_RECORD = _HEADER.size + 24 * MAX_RANGES
"""Bytes of one batch in a page, at most."""


@frozen
class Limits:
    """How copies are divided into batches, in bytes.

    Attributes:
        batch: of a batch that is not packed; longer copies are cut.
        bucket: of a packed batch.
        small: copies shorter than this are packed.
    """

    batch: int
    bucket: int
    small: int


@frozen
class Batch:
    """Bytes that are sent as one.

    Attributes:
        group: the index of the group that it goes through.
        packed: whether its bytes are packed into a bucket.
        sources: ranges of the seed's regions.
        destinations: ranges of the fork's; `sources[k]` is copied to `destinations[k]`.
        copies: for each range, the index of the copy that it belongs to.
    """

    group: int
    packed: bool
    sources: Sequence[ByteRange]
    destinations: Sequence[ByteRange]
    copies: Sequence[int]

    @property
    def nbytes(self) -> int:
        """Bytes of all its ranges."""
        return sum(nbytes for _, _, nbytes in self.sources)


def schedule(copies: Sequence[Copy], groups: Sequence[int], limits: Mapping[int, Limits]) -> Iterator[Batch]:
    """Yield the batches for all copies. `groups[i]` is the index of the group that copies[i] goes through.

    Each batch is made when it is asked for, so that the first moves while the others are made. Groups take turns, so
    that all are busy. Within a group, packed batches and others take turns, so that small batches start while a large
    one moves.
    """
    direct: dict[int, list[int]] = {}
    packed: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        (packed if copies[i].nbytes < limits[group].small else direct).setdefault(group, []).append(i)
    queues = []
    for group in dict.fromkeys(groups):
        limit = limits[group]
        large = _batches(group, False, copies, direct.get(group, ()), _growing_limits(limit.batch))
        small = _batches(group, True, copies, packed.get(group, ()), repeat((limit.bucket, MAX_RANGES)))
        queues.append(_round_robin([large, small]))
    return _round_robin(queues)


def encode_pages(batches: Iterable[Batch]) -> Iterator[tuple[bytes, list[Batch]]]:
    """Yield pages for the seed, each with the batches that it describes.

    A page has what the seed needs: groups and sources. The first page has one batch, and each page after it at most as
    many as all pages before it, so that a page is written while the batches before it move.
    """
    page = bytearray()
    on_page: list[Batch] = []
    on_earlier_pages = 0
    for batch in batches:
        page += _HEADER.pack(batch.group, batch.packed, len(batch.sources))
        page += struct.pack(f"<{3 * len(batch.sources)}Q", *chain.from_iterable(batch.sources))
        on_page.append(batch)
        if len(on_page) >= on_earlier_pages or len(page) + _MAX_RECORD > MAX_PAGE_BYTES:
            yield bytes(page), on_page
            on_earlier_pages += len(on_page)
            page, on_page = bytearray(), []
    if on_page:
        yield bytes(page), on_page


def decode_page(page: bytes) -> list[tuple[int, bool, list[ByteRange]]]:
    """The group's index, whether it is packed, and the ranges of each batch on a page. Raises `ProtocolError`."""
    batches: list[tuple[int, bool, list[ByteRange]]] = []
    position = 0
    while position < len(page):
        try:
            group, packed, count = _HEADER.unpack_from(page, position)
            if not 0 < count <= MAX_RANGES:
                raise ProtocolError(f"a batch of {count} ranges was asked for; it has 1 to {MAX_RANGES}")
            numbers = struct.unpack_from(f"<{3 * count}Q", page, position + _HEADER.size)
        except struct.error as error:
            raise ProtocolError(f"a page of batches is cut short: {error}") from error
        position += _HEADER.size + 24 * count
        batches.append((group, bool(packed), list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))))
    return batches


def _batches(
    group: int, packed: bool, copies: Sequence[Copy], indices: Iterable[int], limits: Iterator[tuple[int, int]]
) -> Iterator[Batch]:
    """Yield batches, all packed or none, for the copies at these indices, in order.

    `limits` yields the largest number of bytes and of ranges for each batch in turn.
    """
    sources: list[ByteRange] = []
    destinations: list[ByteRange] = []
    members: list[int] = []
    max_bytes, max_ranges = next(limits)
    free = max_bytes
    for i in indices:
        copy = copies[i]
        start = 0
        while start < copy.nbytes:
            nbytes = min(max_bytes, copy.nbytes - start)
            if members and (nbytes > free or len(members) == max_ranges):
                yield Batch(group, packed, sources, destinations, members)
                sources, destinations, members = [], [], []
                max_bytes, max_ranges = next(limits)
                free = max_bytes
                continue
            sources.append((copy.region, copy.offset + start, nbytes))
            destinations.append((copy.into, copy.at + start, nbytes))
            members.append(i)
            free -= nbytes
            start += nbytes
    if members:
        yield Batch(group, packed, sources, destinations, members)


def _growing_limits(batch: int) -> Iterator[tuple[int, int]]:
    nbytes, ranges = min(FIRST_BYTES, batch), FIRST_RANGES
    while True:
        yield nbytes, ranges
        nbytes, ranges = min(2 * nbytes, batch), min(2 * ranges, MAX_RANGES)


def _round_robin(queues: Iterable[Iterable[Batch]]) -> Iterator[Batch]:
    unfinished = [iter(queue) for queue in queues]
    while unfinished:
        for queue in list(unfinished):
            batch = next(queue, None)
            if batch is None:
                unfinished.remove(queue)
            else:
                yield batch
