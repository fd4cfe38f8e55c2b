"""The allocations on a GPU, as the CUDA driver knows them; torch does not tell these things.

Which allocation contains an address, whether another process can open it, whether it is still the same. Names and
numbers are those of the CUDA driver API (`cuPointerGetAttribute`).

Memory of `cuMemCreate`, which engines that sleep and torch's ``expandable_segments`` use, is mapped piece by piece into
a range of addresses that was reserved. Of such memory the driver says (read with driver 580, CUDA 13.0, on H100):

* The start and size of the range are those of the *reservation*, for every address in it, mapped or not.
* Each mapping has a buffer id of its own. It is another one after unmapping and mapping, also of the same handle.
* For an address that is not mapped, `cuPointerGetAttribute` fails with INVALID_VALUE. `cuPointerGetAttributes` does
  not: the ordinal is then -2 and the buffer id 0, and in a reservation the range is there all the same.

So a mapping, for us the allocation, is found by its buffer id.
"""

import ctypes
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from attrs import evolve, field, frozen

from tensorfork.errors import TransportUnavailable
from tensorfork.memory import cuda
from tensorfork.regions import Place, Region

_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE = 7, 9, 10, 11, 12

_GRANULE = 2 << 20
"""Bytes of which mappings are multiples, at addresses that are multiples of it."""


@frozen
class Allocation:
    """One allocation of device memory, or one mapping of `cuMemMap`, as the driver knows it.

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
        if not self.is_mapped(address, cuda.driver()):
            raise _not_gpu_memory(address)
        start, nbytes = self._start.value, self._nbytes.value
        found = Allocation(start, nbytes, self._ordinal.value, self._buffer.value, bool(self._legacy.value))
        return found if found.exportable else self._mapping_in(found, address)

    def is_mapped(self, address: int, library: ctypes.CDLL) -> bool:
        """Whether it is mapped on a GPU: of this process, or opened with an IPC handle."""
        code = library.cuPointerGetAttributes(5, self._attributes, self._results, address)
        return not code and self._nbytes.value != 0 and self._ordinal.value >= 0

    def buffer_id(self, address: int) -> int | None:
        """None for what is not mapped."""
        if cuda.driver().cuPointerGetAttribute(self._buffer_result, _BUFFER_ID, address):
            return None
        return self._buffer.value

    def _mapping_in(self, reserved: Allocation, address: int) -> Allocation:
        """The mapping at an address, of which only the reservation that it lies in is known."""
        granule = address - address % _GRANULE
        start = granule - (self._granules(address, -_GRANULE, reserved.buffer_id) - 1) * _GRANULE
        end = granule + self._granules(address, _GRANULE, reserved.buffer_id) * _GRANULE
        start, end = max(start, reserved.start), min(end, reserved.end)
        return evolve(reserved, start=start, nbytes=end - start)

    def _granules(self, address: int, step: int, buffer_id: int) -> int:
        """How many granules have this buffer id, counted from the one at an address in one direction."""
        beyond = 1
        while self.buffer_id(address + beyond * step) == buffer_id:
            beyond *= 2
        return bisect_left(
            range(beyond), True, lo=(beyond + 1) // 2, key=lambda i: self.buffer_id(address + i * step) != buffer_id
        )


def _not_gpu_memory(address: int) -> TransportUnavailable:
    return TransportUnavailable(f"{address:#x} is not memory that this process has on a GPU, or not any more")


def first_unmapped(addresses: Iterable[int]) -> int | None:
    """The first of these addresses that is not mapped on a GPU; None if all are. One query for each.

    Keeps the interpreter: to give it away and take it back for each would cost more where other threads want it.
    """
    query, library = _PointerQuery(), cuda.driver_without_switching()
    return next((address for address in addresses if not query.is_mapped(address, library)), None)


def allocation_at(address: int) -> Allocation:
    """The allocation that contains an address. Raises `TransportUnavailable` if it is not this process's GPU memory."""
    return _PointerQuery().allocation_at(address)


class _Cursor:
    """Finds allocations, and asks no driver for one that was found just before. So what is looked up by address in
    order is queried once for each allocation.
    """

    def __init__(self) -> None:
        self._query, self._last = _PointerQuery(), Allocation(0, 0, 0, 0, False)

    def at(self, address: int) -> Allocation:
        """The allocation that contains an address. Raises `TransportUnavailable` if it is not GPU memory."""
        if not self._last.start <= address < self._last.end:
            self._last = self._query.allocation_at(address)
        return self._last

    def under(self, region: Region) -> Iterator[Allocation]:
        """The allocations that a region on a GPU lies in, in order."""
        at, end = region.address, region.address + max(1, region.nbytes)
        while at < end:
            found = self.at(at)
            yield found
            at = found.end


def _gpu_regions(regions: Sequence[Region]) -> list[Region]:
    """Those on GPUs, by address."""
    return sorted((one for one in regions if one.device != "cpu"), key=lambda one: one.address)


def allocations_of(regions: Sequence[Region]) -> list[Allocation]:
    """The allocations that the regions on GPUs lie in, by address. Queries the driver once for each allocation."""
    cursor = _Cursor()
    found = {one.start: one for region in _gpu_regions(regions) for one in cursor.under(region)}
    return [found[start] for start in sorted(found)]


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

        Raises `TransportUnavailable` if one is not, or is not mapped.
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
    def _check_same(known: Allocation, buffer_id: int | None, region: Region) -> Allocation:
        if buffer_id is None:
            raise _not_gpu_memory(region.address)
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


@frozen
class MappedMemory:
    """The memory of regions on GPUs as it was, to tell later whether it still is."""

    _allocations: Sequence[tuple[Allocation, Sequence[int]]] = field(repr=False)
    """Each with the ids of the regions that it holds, or a part of."""

    @classmethod
    def of(cls, regions: Sequence[Region]) -> "MappedMemory":
        """Remember every allocation that the regions lie in. Needs no driver where none is on a GPU.

        Raises `TransportUnavailable` for memory that is not mapped.
        """
        cursor = _Cursor()
        found: dict[int, tuple[Allocation, list[int]]] = {}
        for region in _gpu_regions(regions):
            for one in cursor.under(region):
                found.setdefault(one.start, (one, []))[1].append(region.id)
        return cls(list(found.values()))

    def moved(self) -> dict[int, str]:
        """By the ids of regions whose memory is not what it was, what happened, in words.

        Asks the driver one question an allocation, 1.5 µs each, whatever the number of regions.
        """
        found: dict[int, str] = {}
        query = _PointerQuery()
        for known, regions in self._allocations:
            buffer_id = query.buffer_id(known.start)
            if buffer_id != known.buffer_id:
                gone = "its memory is not mapped any more"
                found |= dict.fromkeys(
                    regions, gone if buffer_id is None else "its memory was unmapped, and mapped anew"
                )
        return found


def why_unmapped(regions: Sequence[Region]) -> dict[int, str]:
    """By the ids of regions on GPUs, or in part, that cannot be written or read now, why not, in words.

    Where that is none, an engine that puts its memory to sleep can still make it so at any moment.
    """
    found: dict[int, str] = {}
    cursor = _Cursor()
    for region in _gpu_regions(regions):
        try:
            devices = {one.device for one in cursor.under(region)}
        except TransportUnavailable:
            found[region.id] = f"its memory on {region.device} is not mapped: freed, or put to sleep"
        else:
            if elsewhere := devices - {cuda.device_index(region.device)}:
                found[region.id] = f"its memory is on cuda:{elsewhere.pop()} and not on {region.device}"
    return found
