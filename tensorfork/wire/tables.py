"""Tables that travel behind a reply in pages: layouts, regions and places, digests.

A page holds a bounded number of rows, as columns, so that packing, sending or reading one never holds the interpreter
for long. A page that does not have exactly the declared columns and types is a `ProtocolError`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import msgpack
from attrs import fields

from tensorfork.errors import ProtocolError
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.lineage import Version
from tensorfork.model.value_encoding import Encoded, are_encoded
from tensorfork.model.values import MAX_VALUES
from tensorfork.placement import Placement
from tensorfork.regions import Place, RemoteRegion
from tensorfork.validators import is_text
from tensorfork.wire.messages import MAX_TENSORS, Pages, WeightsVersion, Welcome, unpack

PAGE = 500
"""Rows in one page: packed in well under a millisecond."""

_DEVICE = re.compile(r"cpu|cuda:\d{1,4}")

T = TypeVar("T")


def pack_layout(layout: ModelLayout) -> tuple[Pages, list[bytes]]:
    """A layout as pages, and how many there are of each kind."""
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
    """The layout that `pack_layout` packed. Raises `ProtocolError`."""

    def tensor(name: Any, dtype: Any, shape: Any, stride: Any, storage: Any, offset: Any, part: Any) -> TensorLayout:
        placement = None if part is None else Placement(_tuple(part[0]), part[1])
        return TensorLayout(name, dtype, _tuple(shape), _tuple(stride), storage, offset, placement)

    def storage(nbytes: Any, device: Any) -> StorageLayout:
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise ValueError(f"{str(device)[:40]!r} is not a device that a seed can have")
        return StorageLayout(nbytes, device)

    with _protocol_errors("layout"):
        if len(frames) != pages.tensors + pages.storages + pages.left_out:
            raise ValueError(f"it has {len(frames)} pages, and others were announced")
        first_storage, first_left_out = pages.tensors, pages.tensors + pages.storages
        return ModelLayout(
            tuple(_rows(frames[:first_storage], 7, tensor)),
            tuple(_rows(frames[first_storage:first_left_out], 2, storage)),
            tuple(_rows(frames[first_left_out:], 1, _text)),
            *unpack_identity(welcome),
        )


def pack_identity(identity: Identity | None) -> dict[str, Any] | None:
    """An identity as it travels: the fields that were given."""
    if identity is None:
        return None
    return {name: value for name, value in identity.as_dict().items() if value not in (None, {})}


def pack_rank(rank: Rank | None) -> dict[str, Any] | None:
    """A rank as it travels: the coordinates along which there is more than one."""
    return None if rank is None else {name: value for name, value in rank.as_dict().items() if value != (0, 1)}


def unpack_identity(welcome: Welcome) -> tuple[Identity | None, Rank | None]:
    """The seed's identity and rank.

    Raises `ProtocolError`, also for fields that we do not know: they were given, so they must be compared.
    """
    with _protocol_errors("identity"):
        identity, rank = welcome.identity, welcome.rank
        return (
            None if identity is None else Identity(**_known(Identity, identity)),
            None if rank is None else Rank(**{name: tuple(value) for name, value in _known(Rank, rank).items()}),
        )


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(map(str, values.keys() - {one.name for one in fields(kind)})):
        raise ProtocolError(
            f"the seed gives {unknown[0][:40]!r} in its {kind.__name__.lower()}, which this version of tensorfork does "
            "not compare; use the seed's version"
        )
    return values


def pack_version(version: Version) -> WeightsVersion:
    """A version as it travels."""
    return WeightsVersion(version.lineage, version.counter, version.label, version.content)


def unpack_version(version: WeightsVersion) -> Version:
    """The version that `pack_version` packed; raises `ProtocolError`."""
    with _protocol_errors("version"):
        return Version(version.lineage, version.counter, version.label, version.content)


def pack_places(regions: Sequence[RemoteRegion], places: Mapping[int, Place]) -> list[bytes]:
    """Pages: first the number of region pages, then these, then the places of the storages in the regions."""
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

    with _protocol_errors("table of regions"):
        return list(_rows(pages[1 : 1 + _natural(unpack(pages[0]))], 3, region))


def unpack_places(pages: Sequence[bytes]) -> dict[int, Place]:
    """The places that `pack_places` packed, by storage; raises `ProtocolError`."""

    def place(storage: Any, region: Any, offset: Any) -> tuple[int, Place]:
        return _natural(storage), Place(_natural(region), _natural(offset))

    with _protocol_errors("table of places"):
        return dict(_rows(pages[1 + _natural(unpack(pages[0])) :], 3, place))


def pack_values(names: Sequence[str], values: Sequence[Encoded]) -> list[bytes]:
    """Plain values, encoded by `tensorfork.model.value_encoding`, as pages."""
    slices = (slice(start, start + PAGE) for start in range(0, len(names), PAGE))
    return [msgpack.packb([names[some], values[some]]) for some in slices]


def unpack_values(pages: Sequence[bytes]) -> dict[str, Encoded]:
    """The values that `pack_values` packed, by name; raises `ProtocolError`."""
    values: dict[str, Encoded] = {}
    with _protocol_errors("table of values"):
        count = 0
        for page in pages:
            names, encoded = _columns(page, 2)
            count += len(names)
            if not all(map(is_text, names)) or not are_encoded(encoded):
                raise ValueError("it has names or values that are none")
            values.update(zip(names, encoded, strict=True))
            if not len(values) == count <= MAX_VALUES:
                raise ValueError(f"it has more than {MAX_VALUES:,} values, or two by one name")
    return values


def pack_digests(values: Sequence[int]) -> list[bytes]:
    """Digests as frames."""
    return [b"".join(value.to_bytes(8, "little") for value in page) for page in _paged(values)]


def unpack_digests(frames: Sequence[bytes], count: int) -> list[int]:
    """The digests that `pack_digests` packed; raises `ProtocolError` unless there are `count`."""
    packed = b"".join(frames)
    if len(packed) != 8 * count:
        raise ProtocolError(f"{len(packed)} bytes of digests came for {count} tensors")
    return [int.from_bytes(packed[i : i + 8], "little") for i in range(0, len(packed), 8)]


@contextmanager
def _protocol_errors(what: str) -> Iterator[None]:
    """Inside, errors about values are `ProtocolError`s: the peer sent the values."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise ProtocolError(f"a malformed {what} came: {error}") from error


def _paged(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while page := list(islice(iterator, PAGE)):
        yield page


def _rows(pages: Sequence[bytes], columns: int, make: Callable[..., T]) -> Iterator[T]:
    total = 0
    for page in pages:
        table = _columns(page, columns)
        total += len(table[0])
        if total > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS:,} rows")
        yield from map(make, *table)


def _columns(page: bytes, columns: int) -> list[list[Any]]:
    table = unpack(page)
    if not isinstance(table, list) or len(table) != columns or len({len(column) for column in table}) != 1:
        raise ValueError("its columns are not of one length")
    return table


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError(f"{str(value)[:40]!r} is not a list")
    return tuple(value)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _text(value: Any) -> str:
    if not is_text(value):
        raise ValueError("not a short text")
    text: str = value
    return text
