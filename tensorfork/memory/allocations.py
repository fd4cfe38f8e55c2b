"""The allocations that a GPU's memory lies in: what the CUDA driver knows of them, and torch does not.

Which allocation holds an address, whether another process may open it, whether it is still the same. Names and numbers
are those of the CUDA driver API (`cuPointerGetAttribute`).
"""

import ctypes
from collections.abc import Sequence

from attrs import evolve, frozen

from tensorfork.errors import TransportUnavailable
from tensorfork.memory import cuda
from tensorfork.regions import Place, Region

_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE = 7, 9, 10, 11, 12


@frozen
class Allocation:
    """One allocation of device memory, as the driver knows it.

    Attributes:
        start: its address.
        nbytes: its size.
        device: the ordinal of its GPU in this process.
        buffer_id: changes when memory is mapped here anew.
        exportable: whether a CUDA IPC handle can be had for it; not for memory of `cuMemCreate`, which torch uses
            under ``expandable_segments``.
    """

    start: int
    nbytes: int
    device: int
    buffer_id: int
    exportable: bool

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.start + self.nbytes


class _PointerQuery:
    """Asks the driver about one address after another, with ctypes arguments that are made once."""

    def __init__(self) -> None:
        self._kinds = (ctypes.c_int * 5)(_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE)
        self._buffer, self._ordinal, self._legacy = ctypes.c_uint64(), ctypes.c_int(), ctypes.c_int()
        self._start, self._nbytes = ctypes.c_uint64(), ctypes.c_size_t()
        found = self._buffer, self._ordinal, self._legacy, self._start, self._nbytes
        self._values = (ctypes.c_void_p * 5)(*map(ctypes.addressof, found))
        self._to = ctypes.byref(self._buffer)

    def allocation_at(self, address: int) -> Allocation:
        code = cuda.driver().cuPointerGetAttributes(5, self._kinds, self._values, address)
        if code or not self._nbytes.value:
            raise _not_ours(address, code)
        start, nbytes = self._start.value, self._nbytes.value
        return Allocation(start, nbytes, self._ordinal.value, self._buffer.value, bool(self._legacy.value))

    def buffer_id(self, address: int) -> int:
        code = cuda.driver().cuPointerGetAttribute(self._to, _BUFFER_ID, address)
        if code:
            raise _not_ours(address, code)
        return self._buffer.value


def _not_ours(address: int, code: int) -> TransportUnavailable:
    return TransportUnavailable(f"{address:#x} is not memory that this process has on a GPU (driver error {code})")


def allocation_at(address: int) -> Allocation:
    """The allocation that holds an address. Raises `TransportUnavailable` unless it is GPU memory of this process."""
    return _PointerQuery().allocation_at(address)


def allocations_of(regions: Sequence[Region]) -> list[Allocation]:
    """The allocations that the GPU regions lie in, by address. Each is looked up once; most regions lie in one."""
    found: list[Allocation] = []
    query = _PointerQuery()
    for region in sorted((one for one in regions if one.device != "cpu"), key=lambda one: one.address):
        at, end = region.address, region.address + max(1, region.nbytes)
        if found:  # all up to its end has been looked at, from an earlier region's beginning on
            at = max(at, found[-1].end)
        while at < end:
            found.append(query.allocation_at(at))
            at = max(at + 1, found[-1].end)
    return found


class PublishedAllocations:
    """The allocations that memory lay in when it was published.

    A lease asks the driver one short question for each of them, since the seed's steps wait for anything longer: memory
    that was freed, and mapped anew at the same address, has another buffer id. Entries stay; what is published later at
    an address replaces what was there.
    """

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}

    def add(self, regions: Sequence[Region]) -> list[Allocation]:
        """Remember the allocations of memory that is published, perhaps again; returns them as they are now."""
        found = allocations_of(regions)
        self._allocations |= {one.start: one for one in found}
        return found

    def check(self, regions: Sequence[Region]) -> list[Allocation]:
        """The allocations of GPU regions that `enclosing_allocations` made, if they are still the same.

        Raises `TransportUnavailable` where one is not.
        """
        found: list[Allocation] = []
        query = _PointerQuery()
        for region in regions:
            if region.device == "cpu":
                continue
            known = self._allocations.get(region.address)
            if known is not None and region.nbytes <= known.nbytes:
                found.append(self._same(known, query.buffer_id(region.address), region))
            else:  # it reaches beyond its allocation, or was never published
                found += [
                    self._same(self._allocations.get(now.start, now), now.buffer_id, region)
                    for now in allocations_of([region])
                ]
        return found

    @staticmethod
    def _same(known: Allocation, now: int, region: Region) -> Allocation:
        if now != known.buffer_id:
            raise TransportUnavailable(
                f"memory of the model at {region.address:#x} was freed and mapped anew since it was "
                "published; publish again"
            )
        return known


def enclosing_allocations(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """The allocations that the regions lie in, as regions with new ids, and where in them each given region begins.

    A region on the CPU, or in more than one allocation, stays as it is.
    """
    covering: list[Region] = []
    places: dict[int, Place] = {}
    last: Allocation | None = None
    query = _PointerQuery()
    for region in sorted(regions, key=lambda one: (one.device == "cpu", one.address)):
        if region.device == "cpu":
            last = None
        elif last is None or not last.start <= region.address < last.end:
            last = query.allocation_at(region.address)
            if region.address + region.nbytes <= last.end:
                covering.append(Region(len(covering), last.start, last.nbytes, region.device))
        if last is None or region.address + region.nbytes > last.end:
            covering.append(evolve(region, id=len(covering)))
            places[region.id] = Place(covering[-1].id, 0)
            last = None
        else:
            places[region.id] = Place(covering[-1].id, region.address - last.start)
    return covering, [places[region.id] for region in regions]


def why_not_exportable(allocations: Sequence[Allocation]) -> str | None:
    """Why another process could not open these, with the remedy; None where it can."""
    closed = [one for one in allocations if not one.exportable]
    if not closed:
        return None
    return (
        f"{sum(one.nbytes for one in closed) / 1e9:.1f} GB of the model on cuda:{closed[0].device} is memory that CUDA "
        "IPC cannot export: torch's expandable_segments, cuMemCreate, or a memory saver. Unset expandable_segments in "
        "PYTORCH_CUDA_ALLOC_CONF, or use another transport"
    )
