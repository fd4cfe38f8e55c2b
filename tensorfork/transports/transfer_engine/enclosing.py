"""The regions that are registered in place of given ones: whole allocations on GPUs, and on CPUs not too many.

Registering n regions costs O(n²) in Mooncake, and above some 16,000 registrations every read fails. So tensors are not
registered one by one.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from tensorfork.memory import allocations
from tensorfork.regions import Place, Region

MAX_SEPARATE = 1024
"""Up to this many regions on CPUs are registered separately. Above it, close neighbours are joined."""
MAX_GAP = 64 << 10
"""Bytes between two neighbours, at most, for them to be joined."""

_Group = tuple[list[Region], int]
"""Regions that are enclosed together, in order of address, and the address behind their last byte."""


def enclosing_regions(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """Regions that contain the given ones, and where in them each given one begins.

    The enclosing regions do not overlap. They have new ids, which count from 0, and the owners of what they contain.
    """
    gpus = [region for region in regions if region.device != "cpu"]
    whole, gpu_places = allocations.enclosing_allocations(gpus)
    owners: dict[int, dict[int, object]] = defaultdict(dict)
    for region, place in zip(gpus, gpu_places, strict=True):
        owners[place.region][id(region.owner)] = region.owner
    enclosing = [evolve(one, owner=tuple(owners[one.id].values())) for one in whole]
    places = {region.id: place for region, place in zip(gpus, gpu_places, strict=True)}
    for group, end in _grouped([region for region in regions if region.device == "cpu"]):
        start, number = group[0].address, len(enclosing)
        owner = group[0].owner if len(group) == 1 else tuple(region.owner for region in group)
        enclosing.append(Region(number, start, end - start, "cpu", owner))
        for region in group:
            places[region.id] = Place(number, region.address - start)
    return enclosing, [places[region.id] for region in regions]


def _grouped(regions: Sequence[Region]) -> list[_Group]:
    """Group CPU regions that overlap; and, where there are many, close neighbours too."""
    groups: list[_Group] = []
    for region in sorted(regions, key=lambda one: one.address):
        end = region.address + region.nbytes
        if groups and region.address < groups[-1][1]:
            groups[-1] = ([*groups[-1][0], region], max(groups[-1][1], end))
        else:
            groups.append(([region], end))
    return groups if len(groups) <= MAX_SEPARATE else _joined(groups, _readable())


def _joined(groups: Sequence[_Group], readable: Sequence[tuple[int, int]]) -> list[_Group]:
    """Join the closest neighbours until `MAX_SEPARATE` groups are left, or no gap is small enough.

    Two groups are joined only if the memory between them is readable.
    """
    gaps = []
    for i in range(1, len(groups)):
        end = groups[i - 1][1]
        gap = groups[i][0][0].address - end
        at = bisect_right(readable, (end, 0)) - 1
        if gap <= MAX_GAP and at >= 0 and groups[i][1] <= readable[at][1]:
            gaps.append((gap, i))
    to_join = {i for _, i in sorted(gaps)[: len(groups) - MAX_SEPARATE]}
    joined: list[_Group] = []
    for i, (group, end) in enumerate(groups):
        if i in to_join:
            joined[-1][0].extend(group)
            joined[-1] = joined[-1][0], end
        else:
            joined.append((list(group), end))
    return joined


def _readable() -> list[tuple[int, int]]:
    """The ranges (start, end) of address space that this process can read, in order."""
    ranges: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access = line.split(None, 2)[:2]
        start, end = (int(text, 16) for text in addresses.split("-"))
        if access.startswith("r"):
            ranges.append((start, end))
    return ranges
