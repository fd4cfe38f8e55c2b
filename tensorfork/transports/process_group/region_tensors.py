"""Regions as torch sees them: tensors over raw addresses, and ranges of bytes copied into a bucket and out of it."""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from tensorfork import regions as regions_module
from tensorfork.memory.raw import region_bytes
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.transports.process_group.batches import ByteRange


class RegionTensors:
    """The regions of one side. Their memory is kept alive by the caller."""

    def __init__(self, regions: Sequence[Region]) -> None:
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

    def one_byte_on(self, device: str) -> ByteRange:
        """One byte of some region on that device, which must be one of `devices`."""
        return next(region.id for region in self._regions.values() if region.device == device), 0, 1

    def address(self, byte_range: ByteRange) -> int:
        """The address of a range's first byte."""
        return self._regions[byte_range[0]].address + byte_range[1]

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


def gather(regions: RegionTensors, ranges: Sequence[ByteRange], bucket: torch.Tensor) -> None:
    """Copy ranges of CPU memory into a bucket in CPU memory, one after another."""
    destination = bucket.data_ptr()
    for one in ranges:
        ctypes.memmove(destination, regions.address(one), one[2])
        destination += one[2]


def scatter(regions: RegionTensors, ranges: Sequence[ByteRange], bucket: torch.Tensor) -> None:
    """Copy the content of a bucket in CPU memory to ranges of CPU memory, one after another."""
    source = bucket.data_ptr()
    for one in ranges:
        ctypes.memmove(regions.address(one), source, one[2])
        source += one[2]


def merge_adjacent(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """Merge regions that touch or overlap, so that copies which are neighbours on both sides become one copy.

    Returns the merged regions, and where each of the given regions begins in them. No byte is added that is in none of
    the given regions.
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
        if len(cluster) > 1:
            end = max(region.address + region.nbytes for region in cluster)
            first = evolve(first, nbytes=end - first.address, owner=tuple(region.owner for region in cluster))
        merged.append(first)
        places |= {region.id: Place(first.id, region.address - first.address) for region in cluster}
    return merged, [places[region.id] for region in regions]
