"""Copies into parcels, and parcels over the wire. Pure: nothing here touches memory or a socket.

A two-sided transfer needs both sides to name the same bytes in the same order. The fork draws up the order, as parcels,
and the seed follows it. A parcel is what is sent and waited for as one: big stretches as they are, or small ones packed
one behind another into a bucket.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat

from attrs import frozen

from tensorfork.errors import ProtocolError
from tensorfork.regions import Copy

STRETCHES = 1024
"""Stretches in one parcel, at most."""
FIRST_BYTES, FIRST_STRETCHES = 512 << 20, 128
"""Bytes and stretches of a lane's first parcel that is not packed, at most; each one after it may have twice as many.
While both sides begin the first, nothing moves, and each stretch adds 7 us to that; and it must last until the next is
begun, up to 1 ms later, in which 370 MB cross NVLink."""
PAGE = 512 << 10
"""Bytes of parcels in one message; a message on a channel has at most 1 MiB."""

Stretch = tuple[int, int, int]
"""A region's id, an offset in it, and bytes."""

_HEAD = struct.Struct("<HBxI")
_ROW = _HEAD.size + 24 * STRETCHES
"""Bytes of one parcel in a page, at most."""


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
class Batch:
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


def schedule(copies: Sequence[Copy], lanes: Sequence[int], limits: Mapping[int, Limits]) -> Iterator[Batch]:
    """Parcels for all copies, each drawn up when it is asked for: the first moves while the others are. `lanes[i]` is
    the lane of copies[i]. The lanes take turns, so that all are busy; and in each what is sent as it is and what is
    packed, so that small parcels are begun while a large one moves.
    """
    whole: dict[int, list[int]] = {}
    packed: dict[int, list[int]] = {}
    for i, lane in enumerate(lanes):
        (packed if copies[i].nbytes < limits[lane].small else whole).setdefault(lane, []).append(i)
    queues = []
    for lane in dict.fromkeys(lanes):
        limit = limits[lane]
        direct = _fill(lane, False, copies, whole.get(lane, ()), _growing(limit.parcel))
        small = _fill(lane, True, copies, packed.get(lane, ()), repeat((limit.bucket, STRETCHES)))
        queues.append(_in_turn([direct, small]))
    return _in_turn(queues)


def pages(parcels: Iterable[Batch]) -> Iterator[tuple[bytes, list[Batch]]]:
    """The seed's side of parcels, in pages, each with the parcels it is of. The first has one and each one after it at
    most as many as there were before, so that a page is written while what came before it moves.
    """
    page = bytearray()
    held: list[Batch] = []
    before = 0
    for parcel in parcels:
        page += _HEAD.pack(parcel.lane, parcel.packed, len(parcel.theirs))
        page += struct.pack(f"<{3 * len(parcel.theirs)}Q", *chain.from_iterable(parcel.theirs))
        held.append(parcel)
        if len(held) >= before or len(page) + _ROW > PAGE:
            yield bytes(page), held
            before += len(held)
            page, held = bytearray(), []
    if held:
        yield bytes(page), held


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


def _fill(
    lane: int, packed: bool, copies: Sequence[Copy], numbers: Iterable[int], rooms: Iterator[tuple[int, int]]
) -> Iterator[Batch]:
    """Parcels of one kind for the copies of these numbers, in order. `rooms` are the bytes and the stretches of each
    parcel, at most.
    """
    theirs: list[Stretch] = []
    ours: list[Stretch] = []
    held: list[int] = []
    room, most = next(rooms)
    left = room
    for i in numbers:
        copy = copies[i]
        start = 0
        while start < copy.nbytes:
            nbytes = min(room, copy.nbytes - start)
            if held and (nbytes > left or len(held) == most):
                yield Batch(lane, packed, theirs, ours, held)
                theirs, ours, held = [], [], []
                room, most = next(rooms)
                left = room
                continue
            theirs.append((copy.region, copy.offset + start, nbytes))
            ours.append((copy.into, copy.at + start, nbytes))
            held.append(i)
            left -= nbytes
            start += nbytes
    if held:
        yield Batch(lane, packed, theirs, ours, held)


def _growing(parcel: int) -> Iterator[tuple[int, int]]:
    nbytes, stretches = min(FIRST_BYTES, parcel), FIRST_STRETCHES
    while True:
        yield nbytes, stretches
        nbytes, stretches = min(2 * nbytes, parcel), min(2 * stretches, STRETCHES)


def _in_turn(queues: Iterable[Iterable[Batch]]) -> Iterator[Batch]:
    waiting = [iter(queue) for queue in queues]
    while waiting:
        for queue in list(waiting):
            parcel = next(queue, None)
            if parcel is None:
                waiting.remove(queue)
            else:
                yield parcel
