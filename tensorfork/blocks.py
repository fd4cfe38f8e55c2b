"""Blocks: what the CUDA driver says of a GPU's memory, and torch does not.

Which allocation an address lies in, whether another process may open that, whether it is still what it was. Names and
numbers are those of the CUDA driver API (`cuPointerGetAttribute`).
"""

import ctypes
from collections.abc import Sequence

from attrs import evolve, frozen

from tensorfork import cuda
from tensorfork.errors import TransportUnavailable
from tensorfork.transports.base import Place, Region

_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE = 7, 9, 10, 11, 12


@frozen
class Block:
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


class _Look:
    """Asks the driver about addresses, one after another, with arguments that are made once."""

    def __init__(self) -> None:
        self._kinds = (ctypes.c_int * 5)(_BUFFER_ID, _ORDINAL, _LEGACY_IPC, _RANGE_START, _RANGE_SIZE)
        self._buffer, self._ordinal, self._legacy = ctypes.c_uint64(), ctypes.c_int(), ctypes.c_int()
        self._start, self._nbytes = ctypes.c_uint64(), ctypes.c_size_t()
        found = self._buffer, self._ordinal, self._legacy, self._start, self._nbytes
        self._values = (ctypes.c_void_p * 5)(*map(ctypes.addressof, found))
        self._to = ctypes.byref(self._buffer)

    def block(self, address: int) -> Block:
        code = cuda.driver().cuPointerGetAttributes(5, self._kinds, self._values, address)
        if code or not self._nbytes.value:
            raise _not_ours(address, code)
        start, nbytes = self._start.value, self._nbytes.value
        return Block(start, nbytes, self._ordinal.value, self._buffer.value, bool(self._legacy.value))

    def buffer_id(self, address: int) -> int:
        code = cuda.driver().cuPointerGetAttribute(self._to, _BUFFER_ID, address)
        if code:
            raise _not_ours(address, code)
        return self._buffer.value


def _not_ours(address: int, code: int) -> TransportUnavailable:
    return TransportUnavailable(f"{address:#x} is not memory that this process has on a GPU (driver error {code})")


def block(address: int) -> Block:
    """The block an address lies in. Raises `TransportUnavailable` for what is not device memory of this process."""
    return _Look().block(address)


def blocks(regions: Sequence[Region]) -> list[Block]:
    """The blocks that the regions of GPUs lie in, in order of address, each looked up once; most regions lie in one."""
    found: list[Block] = []
    look = _Look()
    for region in sorted((one for one in regions if one.device != "cpu"), key=lambda one: one.address):
        at, end = region.address, region.address + max(1, region.nbytes)
        if found:  # all up to its end has been looked at, from an earlier region's beginning on
            at = max(at, found[-1].end)
        while at < end:
            found.append(look.block(at))
            at = max(at + 1, found[-1].end)
    return found


class Published:
    """The blocks that memory lay in when it was published: what was freed, and mapped anew at the same address, is
    noticed, with one short question to the driver for each block. A seed's steps wait for whatever a lease asks beyond
    that. Nothing is forgotten: what is published at an address again takes the place of what was there.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    def add(self, regions: Sequence[Region]) -> list[Block]:
        """Memory is published, perhaps again; its blocks as they are now."""
        found = blocks(regions)
        self._blocks |= {one.start: one for one in found}
        return found

    def check(self, regions: Sequence[Region]) -> list[Block]:
        """The blocks of regions of GPUs that are to be read, of which `cover` made blocks, if they are what they were.

        Raises `TransportUnavailable` where they are not.
        """
        found: list[Block] = []
        look = _Look()
        for region in regions:
            if region.device == "cpu":
                continue
            known = self._blocks.get(region.address)
            if known is not None and region.nbytes <= known.nbytes:
                found.append(self._same(known, look.buffer_id(region.address), region))
            else:  # it reaches beyond its block, or was never published
                found += [
                    self._same(self._blocks.get(now.start, now), now.buffer_id, region) for now in blocks([region])
                ]
        return found

    @staticmethod
    def _same(known: Block, now: int, region: Region) -> Block:
        if now != known.buffer_id:
            raise TransportUnavailable(
                f"memory of the model at {region.address:#x} was freed and mapped anew since it was "
                "published; publish again"
            )
        return known


def cover(regions: Sequence[Region]) -> tuple[list[Region], list[Place]]:
    """The blocks that the regions lie in, and where in them each begins. What is not a GPU's, or lies in more than one
    block, stays as it is. Region ids are new ones.
    """
    covering: list[Region] = []
    places: dict[int, Place] = {}
    last: Block | None = None
    look = _Look()
    for region in sorted(regions, key=lambda one: (one.device == "cpu", one.address)):
        if region.device == "cpu":
            last = None
        elif last is None or not last.start <= region.address < last.end:
            last = look.block(region.address)
            if region.address + region.nbytes <= last.end:
                covering.append(Region(len(covering), last.start, last.nbytes, region.device))
        if last is None or region.address + region.nbytes > last.end:
            covering.append(evolve(region, id=len(covering)))
            places[region.id] = Place(covering[-1].id, 0)
            last = None
        else:
            places[region.id] = Place(covering[-1].id, region.address - last.start)
    return covering, [places[region.id] for region in regions]


def why_not_exportable(blocks: Sequence[Block]) -> str | None:
    """Why another process could not open these, with the remedy; None where it can."""
    closed = [one for one in blocks if not one.exportable]
    if not closed:
        return None
    return (
        f"{sum(one.nbytes for one in closed) / 1e9:.1f} GB of the model on cuda:{closed[0].device} is memory that CUDA "
        "IPC cannot export: torch's expandable_segments, cuMemCreate, or a memory saver. Unset expandable_segments in "
        "PYTORCH_CUDA_ALLOC_CONF, or use another transport"
    )
