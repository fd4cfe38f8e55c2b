"""Regions as torch sees them: tensors over raw addresses, and small stretches into a bucket and out of it."""

import ctypes
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve

from tensorfork.memory.raw import region_bytes
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.transports.process_group.batches import Stretch


class RegionTensors:
    """The regions of one side. Whoever made them keeps their memory alive."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = {region.id: region for region in regions}
        self._tensors: dict[int, torch.Tensor] = {}

    @property
    def devices(self) -> list[str]:
        """Where the regions are, each once."""
        return sorted({region.device for region in self._regions.values()})

    def holds(self, stretch: Stretch, device: str) -> bool:
        """Whether a stretch lies within one of the regions, on that device."""
        return holds(self._regions, stretch, device)

    def byte_on(self, device: str) -> Stretch:
        """One byte of some region on that device, which must be one of `devices`."""
        return next(region.id for region in self._regions.values() if region.device == device), 0, 1

    def address(self, stretch: Stretch) -> int:
        """Of the first byte of a stretch."""
        return self._regions[stretch[0]].address + stretch[1]

    def view(self, stretch: Stretch) -> torch.Tensor:
        """A stretch as a tensor of bytes that does not own them."""
        id, offset, nbytes = stretch
        tensor = self._tensors.get(id)
        if tensor is None:
            tensor = self._tensors[id] = region_bytes(self._regions[id])
        return tensor.narrow(0, offset, nbytes)


def holds(regions: Mapping[int, Region | RemoteRegion], stretch: Stretch, device: str) -> bool:
    """Whether a stretch lies within one of these regions, on that device."""
    id, offset, nbytes = stretch
    region = regions.get(id)
    return region is not None and region.device == device and 0 <= offset <= region.nbytes - nbytes


def gather(memory: RegionTensors, stretches: Sequence[Stretch], bucket: torch.Tensor) -> None:
    """Copy stretches of the CPU's memory into a bucket in the CPU's memory, one behind another."""
    to = bucket.data_ptr()
    for stretch in stretches:
        ctypes.memmove(to, memory.address(stretch), stretch[2])
        to += stretch[2]


def scatter(memory: RegionTensors, stretches: Sequence[Stretch], bucket: torch.Tensor) -> None:
    """Copy a bucket's content to stretches of the CPU's memory."""
    source = bucket.data_ptr()
    for stretch in stretches:
        ctypes.memmove(memory.address(stretch), source, stretch[2])
        source += stretch[2]


def merge_touching(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """Regions that touch one another become one, so that copies which are neighbours on both sides become one too.

    No byte is added that no region has. The second list says where each of the given regions begins.
    """
    groups: list[list[Region]] = []
    end = 0
    for region in sorted(regions, key=lambda one: (one.device, one.address)):
        if groups and groups[-1][0].device == region.device and region.address <= end:
            groups[-1].append(region)
            end = max(end, region.address + region.nbytes)
        else:
            groups.append([region])
            end = region.address + region.nbytes
    joined: list[Region] = []
    places: dict[int, Place] = {}
    for group in groups:
        first = group[0]
        if len(group) > 1:
            end = max(region.address + region.nbytes for region in group)
            first = evolve(first, nbytes=end - first.address, owner=tuple(region.owner for region in group))
        joined.append(first)
        places |= {region.id: Place(first.id, region.address - first.address) for region in group}
    return joined, [places[region.id] for region in regions]
