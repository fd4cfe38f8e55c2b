"""What a seed tells a fork of its memory, and what both must agree on to read what of it is on the CPU."""

import struct
from collections.abc import Mapping, Sequence

from attrs import frozen

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.process import process_token
from tensorfork.memory import cuda
from tensorfork.regions import Region, RemoteRegion

_OFFER = struct.Struct("<16sI")

_EXPORTED = struct.Struct(f"<QQ{cuda.HANDLE_BYTES}s")

CPU_REQUEST = struct.Struct("<QQQ")

CPU_CHUNK = 512 << 10
"""Bytes of a CPU's region in one message of the channel."""


@frozen
class RemoteAllocation:
    """A region of the seed's: its address there, and a handle for it, or none within one process."""

    address: int
    nbytes: int
    handle: bytes | None


def write_offer(regions: Sequence[Region], handles: Mapping[int, bytes]) -> bytes:
    """What a fork is told. `handles` are those of the regions' blocks, by address; none for a fork of this very
    process.
    """
    exported = [
        _EXPORTED.pack(region.id, region.address, handles.get(region.address, bytes(cuda.HANDLE_BYTES)))
        for region in regions
        if region.device != "cpu"
    ]
    return _OFFER.pack(process_token(), len(exported)) + b"".join(exported)


def read_offer(offer: bytes, remote: Sequence[RemoteRegion]) -> tuple[bool, dict[int, RemoteAllocation]]:
    """Whether the seed is in this process, and where each of its regions is. Raises `TransportUnavailable`."""
    if len(offer) < _OFFER.size or (len(offer) - _OFFER.size) % _EXPORTED.size:
        raise TransportUnavailable("what the seed offers is not an offer of cuda_ipc; use one version on both sides")
    process, count = _OFFER.unpack_from(offer)
    sizes = {region.id: region.nbytes for region in remote if region.device != "cpu"}
    found = list(_EXPORTED.iter_unpack(offer[_OFFER.size :]))
    if len(found) != count or {id for id, _, _ in found} != sizes.keys():
        raise TransportUnavailable(
            "the seed's offer over cuda_ipc does not fit its regions; use one version on both sides"
        )
    within = process == process_token()
    return within, {
        id: RemoteAllocation(address, sizes[id], None if within else handle) for id, address, handle in found
    }
