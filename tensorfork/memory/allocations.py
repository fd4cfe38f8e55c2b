"""The allocations on a GPU, as the CUDA driver knows them; torch does not tell these things.

Which allocation contains an address, whether another process can open it, whether it is still the same. Names and
numbers are those of the CUDA driver API (`cuPointerGetAttribute`).
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
        buffer_id: changes when memory is freed and mapped anew at the same address.
        exportable: whether there is a CUDA IPC handle for it; not for memory of `cuMemCreate`, which torch uses under
            ``expandable_segments``.
    """

    start: int
    nbytes: int
    device: int
    buffer_id: int
    exportable: bool

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.start + self.nbytes


class _PointerQuery:
    """Queries attributes of addresses, one at a time. Its ctypes arguments are made once, which saves time."""

    def __init__(self) -> None:
        self._attributes = (ctypes.c_int * 5)(_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE)
        self._buffer, self._ordinal, self._legacy = ctypes.c_uint64(), ctypes.c_int(), ctypes.c_int()
        self._start, self._nbytes = ctypes.c_uint64(), ctypes.c_size_t()
        results = self._buffer, self._ordinal, self._legacy, self._start, self._nbytes
        self._results = (ctypes.c_void_p * 5)(*map(ctypes.addressof, results))
        self._buffer_result = ctypes.byref(self._buffer)

    def allocation_at(self, address: int) -> Allocation:
        code = cuda.driver().cuPointerGetAttributes(5, self._attributes, self._results, address)
        if code or not self._nbytes.value:
            raise _not_gpu_memory(address, code)
        start, nbytes = self._start.value, self._nbytes.value
        return Allocation(start, nbytes, self._ordinal.value, self._buffer.value, bool(self._legacy.value))

    def buffer_id(self, address: int) -> int:
        code = cuda.driver().cuPointerGetAttribute(self._buffer_result, _BUFFER_ID, address)
        if code:
            raise _not_gpu_memory(address, code)
        return self._buffer.value


def _not_gpu_memory(address: int, code: int) -> TransportUnavailable:
    return TransportUnavailable(f"{address:#x} is not memory that this process has on a GPU (driver error {code})")


def allocation_at(address: int) -> Allocation:
    """The allocation that contains an address. Raises `TransportUnavailable` if it is not this process's GPU memory."""
    return _PointerQuery().allocation_at(address)


def allocations_of(regions: Sequence[Region]) -> list[Allocation]:
    """The allocations that the regions on GPUs lie in, by address. Queries the driver once for each allocation."""
    found: list[Allocation] = []
    query = _PointerQuery()
    for region in sorted((one for one in regions if one.device != "cpu"), key=lambda one: one.address):
        at, end = region.address, region.address + max(1, region.nbytes)
        if found:  # the allocations up to its end have been found already
            at = max(at, found[-1].end)
        while at < end:
            found.append(query.allocation_at(at))
            at = max(at + 1, found[-1].end)
    return found


class PublishedAllocations:
    """The allocations that published memory lay in when it was published.

    At a lease, only the buffer id of each is queried, because the seed's inference steps wait for anything longer. It
    tells whether memory was freed and mapped anew at the same address. Entries are kept; publishing at an address again
    replaces its entry.
    """

    def __init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}

    def add(self, regions: Sequence[Region]) -> list[Allocation]:
        """Remember the allocations of published regions, as they are now, and return them."""
        found = allocations_of(regions)
        self._allocations |= {one.start: one for one in found}
        return found

    def check(self, regions: Sequence[Region]) -> list[Allocation]:
        """The allocations of regions on GPUs that `enclosing_allocations` returned, if they are still the same.

        Raises `TransportUnavailable` if one is not.
        """
        found: list[Allocation] = []
        query = _PointerQuery()
        for region in regions:
            if region.device == "cpu":
                continue
            known = self._allocations.get(region.address)
            if known is not None and region.nbytes <= known.nbytes:
                found.append(self._check_same(known, query.buffer_id(region.address), region))
            else:  # it reaches beyond its allocation, or was never published
                found += [
                    self._check_same(self._allocations.get(now.start, now), now.buffer_id, region)
                    for now in allocations_of([region])
                ]
        return found

    @staticmethod
    def _check_same(known: Allocation, buffer_id: int, region: Region) -> Allocation:
        if buffer_id != known.buffer_id:
            raise TransportUnavailable(
                f"memory of the model at {region.address:#x} was freed and mapped anew since it was "
                "published; publish again"
            )
        return known


def enclosing_allocations(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """The allocations that the regions lie in, as regions with new ids, and where in these each given region begins.

    A region on the CPU, or in more than one allocation, is returned as it is, with a new id.
    """
    enclosing: list[Region] = []
    places: dict[int, Place] = {}
    last: Allocation | None = None
    query = _PointerQuery()
    for region in sorted(regions, key=lambda one: (one.device == "cpu", one.address)):
        if region.device == "cpu":
            last = None
        elif last is None or not last.start <= region.address < last.end:
            last = query.allocation_at(region.address)
            if region.address + region.nbytes <= last.end:
                enclosing.append(Region(len(enclosing), last.start, last.nbytes, region.device))
        if last is None or region.address + region.nbytes > last.end:
            enclosing.append(evolve(region, id=len(enclosing)))
            places[region.id] = Place(enclosing[-1].id, 0)
            last = None
        else:
            places[region.id] = Place(enclosing[-1].id, region.address - last.start)
    return enclosing, [places[region.id] for region in regions]


def why_not_exportable(allocations: Sequence[Allocation]) -> str | None:
    """Why another process cannot open these allocations, with the remedy; None if it can."""
    private = [one for one in allocations if not one.exportable]
    if not private:
        return None
    size = sum(one.nbytes for one in private)
    return (
        f"{size / 1e9:.1f} GB of the model on cuda:{private[0].device} is memory that CUDA "
        "IPC cannot export: torch's expandable_segments, cuMemCreate, or a memory saver. Unset expandable_segments in "
        "PYTORCH_CUDA_ALLOC_CONF, or use another transport"
    )


class MappedMemory:
    """The allocations of regions on GPUs as they were, to tell later whether they still are."""

    def __init__(self, allocations: Sequence[tuple[int, Allocation]]) -> None:
        self._allocations = allocations

    @classmethod
    def of(cls, regions: Sequence[Region]) -> "MappedMemory":
        """Remember the allocation that each region begins in. Asks no driver where no region is on a GPU."""
        query = _PointerQuery()
        return cls([(one.id, query.allocation_at(one.address)) for one in regions if one.device != "cpu"])

    def moved(self) -> dict[int, str]:
        """By the ids of regions whose memory is not what it was, what happened, in words."""
        found: dict[int, str] = {}
        query = _PointerQuery()
        for region, known in self._allocations:
            try:
                if query.buffer_id(known.start) != known.buffer_id:
                    found[region] = "its memory was unmapped, and mapped anew"
            except TransportUnavailable:
                found[region] = "its memory is not mapped any more"
        return found
