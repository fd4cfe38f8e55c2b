"""Copies into parcels, and parcels over the wire. Pure: nothing here touches memory or a socket.

A two-sided transfer needs both sides to name the same bytes in the same order. The fork draws up the order, as parcels,
and the seed follows it. A parcel is what is sent and waited for as one: big stretches as they are, or small ones packed
one behind another into a bucket.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import define, field, frozen

from tensorfork.errors import ProtocolError
from tensorfork.transports.base import Copy

STRETCHES = 1024
"""Stretches in one parcel, at most."""
FIRST, GROWTH = 256 << 20, 16
"""Bytes of a lane's first parcel, at most, and how often that is doubled: while both sides begin the first, nothing
moves, and to begin another takes 0.5 ms, in which 180 MB cross NVLink."""
PAGE = 512 << 10
"""Bytes of parcels in one message; a message on a channel has at most 1 MiB."""

Stretch = tuple[int, int, int]
"""A region's id, an offset in it, and bytes."""

_HEAD = struct.Struct("<HBxI")


@frozen
class Limits:
    """How copies become parcels, in bytes.

    Attributes:
        parcel: of one parcel that is sent as it is; longer copies are cut.
        bucket: of one packed parcel.
        small: copies shorter than this are packed.
    """

    parcel: int
    bucket: int
    small: int


@frozen
class Parcel:
    """What travels as one: `theirs[k]` becomes `ours[k]`, and belongs to the copy of number `copies[k]`."""

    lane: int
    packed: bool
    theirs: Sequence[Stretch]
    ours: Sequence[Stretch]
    copies: Sequence[int]

    @property
    def nbytes(self) -> int:
        """Bytes of all its stretches."""
        return sum(nbytes for _, _, nbytes in self.theirs)


@define
class _Open:
    """A parcel that is being filled."""

    nbytes: int = 0
    theirs: list[Stretch] = field(factory=list)
    ours: list[Stretch] = field(factory=list)
    copies: list[int] = field(factory=list)


def schedule(copies: Sequence[Copy], lanes: Sequence[int], limits: Mapping[int, Limits]) -> list[Parcel]:
    """Parcels for all copies. `lanes[i]` is the lane of copies[i]; the lanes take turns, so that all are busy."""
    closed: dict[int, list[Parcel]] = defaultdict(list)
    filling: dict[tuple[int, bool], _Open] = defaultdict(_Open)
    whole: dict[int, int] = defaultdict(int)  # parcels of each lane that are sent as they are

    def close(lane: int, packed: bool) -> None:
        full = filling.pop((lane, packed))
        closed[lane].append(Parcel(lane, packed, full.theirs, full.ours, full.copies))
        whole[lane] += not packed

    for i, (copy, lane) in enumerate(zip(copies, lanes, strict=True)):
        packed = copy.nbytes < limits[lane].small
        start = 0
        while start < copy.nbytes:
            room = limits[lane].bucket if packed else min(limits[lane].parcel, FIRST << min(whole[lane], GROWTH))
            nbytes = min(room, copy.nbytes - start)
            parcel = filling[lane, packed]
            if parcel.copies and (parcel.nbytes + nbytes > room or len(parcel.copies) == STRETCHES):
                close(lane, packed)
                continue
            parcel.theirs.append((copy.region, copy.offset + start, nbytes))
            parcel.ours.append((copy.into, copy.at + start, nbytes))
            parcel.copies.append(i)
            parcel.nbytes += nbytes
            start += nbytes
    for lane, packed in list(filling):
        close(lane, packed)
    return list(_in_turn(closed.values()))


def pages(parcels: Sequence[Parcel]) -> Iterator[tuple[bytes, int]]:
    """The seed's side of parcels, in pages; each with how many parcels it has."""
    page, count = bytearray(), 0
    for parcel in parcels:
        row = _HEAD.pack(parcel.lane, parcel.packed, len(parcel.theirs))
        row += struct.pack(f"<{3 * len(parcel.theirs)}Q", *(number for stretch in parcel.theirs for number in stretch))
        if page and len(page) + len(row) > PAGE:
            yield bytes(page), count
            page, count = bytearray(), 0
        page += row
        count += 1
    if page:
        yield bytes(page), count


def read_page(page: bytes) -> list[tuple[int, bool, list[Stretch]]]:
    """Lane, packed or not, and stretches of each parcel of a page. Raises `ProtocolError`."""
    found: list[tuple[int, bool, list[Stretch]]] = []
    at = 0
    while at < len(page):
        try:
            lane, packed, count = _HEAD.unpack_from(page, at)
            if not 0 < count <= STRETCHES:
                raise ProtocolError(f"a parcel of {count} stretches was asked for; it has 1 to {STRETCHES}")
            numbers = struct.unpack_from(f"<{3 * count}Q", page, at + _HEAD.size)
        except struct.error as error:
            raise ProtocolError(f"a page of parcels is cut short: {error}") from error
        at += _HEAD.size + 24 * count
        found.append((lane, bool(packed), list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))))
    return found


def _in_turn(queues: Iterable[Sequence[Parcel]]) -> Iterator[Parcel]:
    waiting = [iter(queue) for queue in queues]
    while waiting:
        for queue in list(waiting):
            parcel = next(queue, None)
            if parcel is None:
                waiting.remove(queue)
            else:
                yield parcel
