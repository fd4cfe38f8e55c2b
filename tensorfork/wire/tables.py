"""Tables that travel behind a reply in pages: layouts, regions and places, digests.

A page holds a bounded number of rows as columns, so that packing, sending or reading one never holds the interpreter for
long. What does not have exactly the declared shape is a `ProtocolError`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgpack

from tensorfork.errors import ProtocolError
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.placement import Placement
from tensorfork.regions import Place, RemoteRegion
from tensorfork.wire.messages import MAX_TENSORS, Pages, Welcome, unpack

PAGE = 500
"""Tensors, or storages, in one frame: packed in well under a millisecond."""

_DEVICE = re.compile(r"cpu|cuda:\d{1,4}")

T = TypeVar("T")


def pack_layout(layout: ModelLayout) -> tuple[Pages, list[bytes]]:
    """A layout as pages of columns, and how many there are of each kind."""
    tensors, storages = _pack_tensors(layout.tensors), _pack_storages(layout.storages)
    left_out = [msgpack.packb([page]) for page in _paged(layout.left_out)]
    return Pages(len(tensors), len(storages), len(left_out)), [*tensors, *storages, *left_out]


def _pack_tensors(tensors: Sequence[TensorLayout]) -> list[bytes]:
    return [
        msgpack.packb(
            [
                [t.name for t in page],
                [t.dtype for t in page],
                [t.shape for t in page],
                [t.stride for t in page],
                [t.storage for t in page],
                [t.offset for t in page],
                [None if t.placement is None else [t.placement.shape, t.placement.how] for t in page],
            ]
        )
        for page in _paged(tensors)
    ]


def _pack_storages(storages: Sequence[StorageLayout]) -> list[bytes]:
    return [msgpack.packb([[s.nbytes for s in page], [s.device for s in page]]) for page in _paged(storages)]


def unpack_layout(pages: Pages, frames: Sequence[bytes], welcome: Welcome) -> ModelLayout:
    """The layout from its pages. Raises `ProtocolError` unless every value has its type and place."""

    def tensor(name: Any, dtype: Any, shape: Any, stride: Any, storage: Any, offset: Any, part: Any) -> TensorLayout:
        placement = None if part is None else Placement(_tuple(part[0]), part[1])
        return TensorLayout(name, dtype, _tuple(shape), _tuple(stride), storage, offset, placement)

    def storage(nbytes: Any, device: Any) -> StorageLayout:
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise ValueError(f"{str(device)[:40]!r} is not a device that a seed can have")
        return StorageLayout(nbytes, device)

    with _Reading("layout"):
        if len(frames) != pages.tensors + pages.storages + pages.left_out:
            raise ValueError(f"it has {len(frames)} pages, and others were announced")
        storages, left_out = pages.tensors, pages.tensors + pages.storages
        return ModelLayout(
            tuple(_rows(frames[:storages], 7, tensor)),
            tuple(_rows(frames[storages:left_out], 2, storage)),
            tuple(_rows(frames[left_out:], 1, _text)),
            *unpack_identity(welcome),
        )


def unpack_identity(welcome: Welcome) -> tuple[Identity | None, Rank | None]:
    """What the seed says it is; raises `ProtocolError`."""
    with _Reading("identity"):
        return (
            None if welcome.identity is None else Identity(**welcome.identity),
            None if welcome.rank is None else Rank(**{name: tuple(value) for name, value in welcome.rank.items()}),
        )


def pack_places(regions: Sequence[RemoteRegion], places: Mapping[int, Place]) -> list[bytes]:
    """Regions, then each storage's place in them; as pages, how many are the regions' first."""
    region_pages = [
        msgpack.packb([[r.id for r in page], [r.nbytes for r in page], [r.device for r in page]])
        for page in _paged(regions)
    ]
    place_pages = [
        msgpack.packb([[i for i, _ in page], [p.region for _, p in page], [p.offset for _, p in page]])
        for page in _paged(list(places.items()))
    ]
    return [msgpack.packb(len(region_pages)), *region_pages, *place_pages]


def unpack_regions(pages: Sequence[bytes]) -> list[RemoteRegion]:
    """The regions that `pack_places` packed; raises `ProtocolError`."""

    def region(id: Any, nbytes: Any, device: Any) -> RemoteRegion:
        return RemoteRegion(_natural(id), _natural(nbytes), _text(device))

    with _Reading("table of regions"):
        return list(_rows(pages[1 : 1 + _natural(unpack(pages[0]))], 3, region))


def unpack_places(pages: Sequence[bytes]) -> dict[int, Place]:
    """The places that it packed beside them, by storage; raises `ProtocolError`."""

    def place(storage: Any, region: Any, offset: Any) -> tuple[int, Place]:
        return _natural(storage), Place(_natural(region), _natural(offset))

    with _Reading("table of places"):
        return dict(_rows(pages[1 + _natural(unpack(pages[0])) :], 3, place))


def pack_digests(values: Sequence[int]) -> list[bytes]:
    """Digests as frames."""
    return [b"".join(value.to_bytes(8, "little") for value in page) for page in _paged(values)]


def unpack_digests(frames: Sequence[bytes], count: int) -> list[int]:
    """`count` digests; raises `ProtocolError` for another number of them."""
    whole = b"".join(frames)
    if len(whole) != 8 * count:
        raise ProtocolError(f"{len(whole)} bytes of digests came for {count} tensors")
    return [int.from_bytes(whole[i : i + 8], "little") for i in range(0, len(whole), 8)]


class _Reading:
    """Whatever goes wrong inside is the peer's doing."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError | TypeError | LookupError):
            raise ProtocolError(f"a malformed {self._what} came: {error}") from error


def _paged(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while page := list(islice(left, PAGE)):
        yield page


def _rows(pages: Sequence[bytes], columns: int, make: Callable[..., T]) -> Iterator[T]:
    total = 0
    for page in pages:
        table = unpack(page)
        if not isinstance(table, list) or len(table) != columns or len({len(column) for column in table}) != 1:
            raise ValueError("its columns are not of one length")
        total += len(table[0])
        if total > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS:,} rows")
        yield from map(make, *table)


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError(f"{str(value)[:40]!r} is not a list")
    return tuple(value)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 4096:
        raise ValueError("not a short text")
    return value
