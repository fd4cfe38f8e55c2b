"""Tables that travel behind a reply in pages: layouts, regions and places, plain values, digests.

All but the digests are columns by name (`tensorfork.wire.pages`). What lacks a column, or has values that cannot be, is
a `ProtocolError`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

from attrs import fields

from tensorfork.columns import naturals, objects_of, sizes, texts
from tensorfork.errors import ProtocolError
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.lineage import Version
from tensorfork.model.value_encoding import Encoded, are_encoded
from tensorfork.model.values import MAX_VALUES
from tensorfork.patience import Check, unchecked
from tensorfork.placement import Placement
from tensorfork.regions import Place, RemoteRegion
from tensorfork.wire.messages import Pages, WeightsVersion, Welcome
from tensorfork.wire.pages import PAGE, Column, pack_pages, paged, read_pages

_DEVICE = re.compile(r"cpu|cuda:\d{1,4}")


# Layouts.


def pack_layout(layout: ModelLayout) -> tuple[Pages, list[bytes]]:
    """A layout as pages, and how many there are of each kind."""
    tensors, storages = pack_pages(layout.tensors, _tensor_columns), pack_pages(layout.storages, _storage_columns)
    left_out = pack_pages(layout.left_out, lambda names: {"name": names})
    return Pages(len(tensors), len(storages), len(left_out)), [*tensors, *storages, *left_out]


def _tensor_columns(tensors: Sequence[TensorLayout]) -> dict[str, Sequence[Any]]:
    columns: dict[str, Sequence[Any]] = {
        "name": [one.name for one in tensors],
        "dtype": [one.dtype for one in tensors],
        "shape": [one.shape for one in tensors],
        "stride": [one.stride for one in tensors],
        "storage": [one.storage for one in tensors],
        "offset": [one.offset for one in tensors],
    }
    if any(one.placement is not None for one in tensors):
        placements = [one.placement for one in tensors]
        columns["placement"] = [None if one is None else [one.shape, one.how] for one in placements]
    return columns


def _storage_columns(storages: Sequence[StorageLayout]) -> dict[str, Sequence[Any]]:
    return {"nbytes": [one.nbytes for one in storages], "device": [one.device for one in storages]}


def _devices(column: list[Any]) -> list[str]:
    if strange := [one for one in set(texts(column)) if not _DEVICE.fullmatch(one)]:
        raise ValueError(f"{strange[0][:40]!r} is not a device that a seed can have")
    return column


def _placements(column: list[Any]) -> list[Placement | None]:
    given = [one for one in column if one is not None]
    if any(type(one) is not list or len(one) != 2 for one in given):
        raise ValueError("a placement is no shape and text")
    made = iter(list(starmap(Placement, zip(sizes([one[0] for one in given]), [one[1] for one in given], strict=True))))
    return [None if one is None else next(made) for one in column]


_TENSORS = (
    Column("name", texts),
    Column("dtype", texts),
    Column("shape", sizes),
    Column("stride", sizes),
    Column("storage", naturals),
    Column("offset", naturals),
    Column("placement", _placements, default=None),
)

_STORAGES = Column("nbytes", naturals), Column("device", _devices)

_NAMES = (Column("name", texts),)


def unpack_layout(pages: Pages, frames: Sequence[bytes], welcome: Welcome, check: Check = unchecked) -> ModelLayout:
    """The layout that `pack_layout` packed. Raises `ProtocolError`, also for more than the welcome announced.

    This and the others that unpack call `check` before each page.
    """

    def storages(nbytes: Sequence[int], device: Sequence[str]) -> list[StorageLayout]:
        return objects_of(StorageLayout, nbytes=nbytes, device=device)

    with _protocol_errors("layout"):
        if len(frames) != pages.tensors + pages.storages + pages.left_out:
            raise ValueError(f"it has {len(frames)} pages, and others were announced")
        first_storage, first_left_out = pages.tensors, pages.tensors + pages.storages
        return ModelLayout(
            tuple(read_pages(frames[:first_storage], _TENSORS, TensorLayout.of_columns, welcome.tensors, check)),
            tuple(read_pages(frames[first_storage:first_left_out], _STORAGES, storages, welcome.storages, check)),
            tuple(read_pages(frames[first_left_out:], _NAMES, iter, welcome.left_out, check)),
            *unpack_identity(welcome),
        )


# What a welcome tells of a model.


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


# Regions and places.


def pack_regions(regions: Sequence[RemoteRegion]) -> list[bytes]:
    """Regions as pages."""
    return pack_pages(
        regions,
        lambda some: {
            "id": [one.id for one in some],
            "nbytes": [one.nbytes for one in some],
            "device": [one.device for one in some],
        },
    )


def pack_places(places: Mapping[int, Place]) -> list[bytes]:
    """The places of storages as pages."""
    return pack_pages(
        places.items(),
        lambda some: {
            "storage": [storage for storage, _ in some],
            "region": [place.region for _, place in some],
            "offset": [place.offset for _, place in some],
        },
    )


_REGIONS = Column("id", naturals), Column("nbytes", naturals), Column("device", texts)

_PLACES = Column("storage", naturals), Column("region", naturals), Column("offset", naturals)


def unpack_regions(pages: Sequence[bytes], most: int, check: Check = unchecked) -> list[RemoteRegion]:
    """The regions that `pack_regions` packed; raises `ProtocolError`, also for more than `most`."""

    def regions(id: Sequence[int], nbytes: Sequence[int], device: Sequence[str]) -> list[RemoteRegion]:
        return objects_of(RemoteRegion, id=id, nbytes=nbytes, device=device)

    with _protocol_errors("table of regions"):
        return list(read_pages(pages, _REGIONS, regions, most, check))


def unpack_places(pages: Sequence[bytes], most: int, check: Check = unchecked) -> dict[int, Place]:
    """The places that `pack_places` packed, by storage; raises `ProtocolError`, also for more than `most`."""

    def places(storage: Sequence[int], region: Sequence[int], offset: Sequence[int]) -> "zip[tuple[int, Place]]":
        return zip(storage, objects_of(Place, region=region, offset=offset), strict=True)

    with _protocol_errors("table of places"):
        return dict(read_pages(pages, _PLACES, places, most, check))


# Plain values.


def pack_values(names: Sequence[str], values: Sequence[Encoded]) -> list[bytes]:
    """Plain values, encoded by `tensorfork.model.value_encoding`, as pages."""
    return pack_pages(
        zip(names, values, strict=True),
        lambda some: {"name": [name for name, _ in some], "value": [value for _, value in some]},
    )


def _encoded(column: list[Any]) -> list[Encoded]:
    if not are_encoded(column):
        raise ValueError("it has values that are none")
    return column


_VALUES = Column("name", texts), Column("value", _encoded)


def unpack_values(pages: Sequence[bytes], check: Check = unchecked) -> dict[str, Encoded]:
    """The values that `pack_values` packed, by name; raises `ProtocolError`."""
    with _protocol_errors("table of values"):
        rows = list(read_pages(pages, _VALUES, zip, MAX_VALUES, check))
        values = dict(rows)
        if len(values) != len(rows):
            raise ValueError("it has two values by one name")
    return values


# Digests.


def pack_digests(values: Sequence[int]) -> list[bytes]:
    """Digests as frames."""
    return [b"".join(value.to_bytes(8, "little") for value in page) for page in paged(values)]


def unpack_digests(frames: Sequence[bytes], count: int) -> list[int]:
    """The digests that `pack_digests` packed; raises `ProtocolError` unless there are `count`."""
    packed = b"".join(frames)
    if len(packed) != 8 * count:
        raise ProtocolError(f"{len(packed)} bytes came for {count} digests")
    return [int.from_bytes(packed[i : i + 8], "little") for i in range(0, len(packed), 8)]


def one_digest(frames: Sequence[bytes], i: int) -> bytes:
    """One of the digests that `pack_digests` packed, packed."""
    return frames[i // PAGE][i % PAGE * 8 :][:8]


@contextmanager
def _protocol_errors(what: str) -> Iterator[None]:
    """Inside, errors about values are `ProtocolError`s: the peer sent the values."""
    try:
        yield
    except (ValueError, TypeError, LookupError) as error:
        raise ProtocolError(f"a malformed {what} came: {error}") from error
