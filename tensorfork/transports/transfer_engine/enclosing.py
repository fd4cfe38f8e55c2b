"""The regions that are registered for given ones: allocator blocks for GPUs, and few enough of them on CPUs.

Registering costs O(n²) in Mooncake, and above some 16,000 registrations every read fails, so tensors are not registered
one by one.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from tensorfork.memory import allocations
from tensorfork.regions import Place, Region

FEW = 1024
"""Regions on CPUs from which on neighbours are covered together."""
GAP = 64 << 10
"""Bytes between two neighbours, at most, that are covered with them."""


def enclosing_regions(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """Regions that contain the given ones, and where in them each begins; no two of them overlap. Ids are new ones."""
    gpus = [region for region in regions if region.device != "cpu"]
    whole, in_blocks = allocations.enclosing_allocations(gpus)
    owners: dict[int, dict[int, object]] = defaultdict(dict)
    for region, place in zip(gpus, in_blocks, strict=True):
        owners[place.region][id(region.owner)] = region.owner
    covering = [evolve(block, owner=tuple(owners[block.id].values())) for block in whole]
    places = {region.id: place for region, place in zip(gpus, in_blocks, strict=True)}
    for group, end in _grouped([region for region in regions if region.device == "cpu"]):
        start, number = group[0].address, len(covering)
        owner = group[0].owner if len(group) == 1 else tuple(region.owner for region in group)
        covering.append(Region(number, start, end - start, "cpu", owner))
        for region in group:
            places[region.id] = Place(number, region.address - start)
    return covering, [places[region.id] for region in regions]


def _grouped(regions: Sequence[Region]) -> list[tuple[list[Region], int]]:
    """Regions of the host's memory that are to be covered together, each time with the address behind the last byte:
    those that overlap; and, where there are many, close neighbours.
    """
    groups: list[tuple[list[Region], int]] = []
    for region in sorted(regions, key=lambda one: one.address):
        end = region.address + region.nbytes
        if groups and region.address < groups[-1][1]:
            groups[-1] = ([*groups[-1][0], region], max(groups[-1][1], end))
        else:
            groups.append(([region], end))
    return groups if len(groups) <= FEW else _joined(groups, _readable())


def _joined(
    groups: Sequence[tuple[list[Region], int]], readable: Sequence[tuple[int, int]]
) -> list[tuple[list[Region], int]]:
    """Join the closest neighbours until there are few. What lies between them must be memory of this process too."""
    gaps = []
    for i in range(1, len(groups)):
        end = groups[i - 1][1]
        gap = groups[i][0][0].address - end
        at = bisect_right(readable, (end, 0)) - 1
        if gap <= GAP and at >= 0 and groups[i][1] <= readable[at][1]:
            gaps.append((gap, i))
    to_join = {i for _, i in sorted(gaps)[: len(groups) - FEW]}
    fewer: list[tuple[list[Region], int]] = []
    for i, (group, end) in enumerate(groups):
        if i in to_join:
            fewer[-1][0].extend(group)
            fewer[-1] = fewer[-1][0], end
        else:
            fewer.append((list(group), end))
    return fewer


def _readable() -> list[tuple[int, int]]:
    """The stretches of address space that this process can read, in order."""
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access = line.split(None, 2)[:2]
        start, end = (int(text, 16) for text in addresses.split("-"))
        if access.startswith("r"):
            found.append((start, end))
    return found
