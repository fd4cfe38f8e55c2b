"""Regions as torch sees them: tensors over raw addresses, and ranges of bytes that are copied."""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from tensorfork import regions as regions_module
from tensorfork.memory.raw import region_bytes
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.runs import union
from tensorfork.transports.process_group.batches import ByteRange


class RegionTensors:
    """The regions of one side. Their memory is kept alive by the caller.

    Attributes:
        stable: whether all memory on the CPU is `Region.stable`, so that it may be sent in place.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.stable = all(region.stable for region in regions if region.device == "cpu")
        self._regions = {region.id: region for region in regions}
        self._tensors: dict[int, torch.Tensor] = {}

    @property
    def devices(self) -> list[str]:
        """The devices that the regions are on, without duplicates."""
        return sorted({region.device for region in self._regions.values()})

    def device_of(self, region: int) -> str:
        """The device of the region with this id. Raises KeyError if there is none."""
        return self._regions[region].device

    def contains(self, byte_range: ByteRange, device: str) -> bool:
        """Whether a range lies within one of the regions, on that device."""
        return contains(self._regions, byte_range, device)

    def may_read(self, byte_range: ByteRange, device: str) -> bool:
        """Whether the other side may read a range, and that is on this device."""
        id, offset, nbytes = byte_range
        region = self._regions.get(id)
        return region is not None and region.device == device and regions_module.may_read(region, offset, nbytes)

    def no_bytes_on(self, device: str) -> ByteRange:
        """An empty range of some region on that device, which must be one of `devices`."""
        return next(region.id for region in self._regions.values() if region.device == device), 0, 0

    def address(self, byte_range: ByteRange) -> int:
        """The address of a range's first byte."""
        return self._regions[byte_range[0]].address + byte_range[1]

    def spans(self, ranges: Sequence[ByteRange]) -> list[tuple[int, int]]:
        """The (address, bytes) of each range."""
        return [(self.address(one), one[2]) for one in ranges]

    def view(self, byte_range: ByteRange) -> torch.Tensor:
        """A range as a tensor of bytes that does not own them."""
        id, offset, nbytes = byte_range
        tensor = self._tensors.get(id)
        if tensor is None:
            tensor = self._tensors[id] = region_bytes(self._regions[id])
        return tensor.narrow(0, offset, nbytes)


def contains(regions: Mapping[int, Region | RemoteRegion], byte_range: ByteRange, device: str) -> bool:
    """Whether a range lies within one of these regions, on that device."""
    id, offset, nbytes = byte_range
    region = regions.get(id)
    return region is not None and region.device == device and regions_module.contains(region, offset, nbytes)


def scatter(regions: RegionTensors, ranges: Sequence[ByteRange], bucket: torch.Tensor) -> None:
    """Copy the content of a bucket in CPU memory to ranges of CPU memory, one after another."""
    source = bucket.data_ptr()
    for address, nbytes in regions.spans(ranges):
        ctypes.memmove(address, source, nbytes)
        source += nbytes


def merge_adjacent(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """Merge regions that touch or overlap, so that copies which are neighbours on both sides become one copy.

    Returns the merged regions, and where each of the given regions begins in them. No byte is added that is in none of
    the given regions, and none is published that is published in none of them.
    """
    clusters: list[list[Region]] = []
    end = 0
    for region in sorted(regions, key=lambda one: (one.device, one.address)):
        if clusters and clusters[-1][0].device == region.device and region.address <= end:
            clusters[-1].append(region)
            end = max(end, region.address + region.nbytes)
        else:
            clusters.append([region])
            end = region.address + region.nbytes
    merged: list[Region] = []
    places: dict[int, Place] = {}
    for cluster in clusters:
        first = cluster[0]
        merged.append(_merge(cluster) if len(cluster) > 1 else first)
        places |= {region.id: Place(first.id, region.address - first.address) for region in cluster}
    return merged, [places[region.id] for region in regions]


def _merge(cluster: Sequence[Region]) -> Region:
    """Regions that touch or overlap, by address, as one."""
    first = cluster[0]
    nbytes = max(region.address + region.nbytes for region in cluster) - first.address
    published = union(
        (region.address - first.address + start, region.address - first.address + end)
        for region in cluster
        for start, end in ([(0, region.nbytes)] if region.published is None else region.published)
    )
    return evolve(
        first,
        nbytes=nbytes,
        owner=tuple(region.owner for region in cluster),
        published=None if published == [(0, nbytes)] else published,
        stable=all(region.stable for region in cluster),
    )
