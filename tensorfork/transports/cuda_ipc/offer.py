"""What the two sides say: the offer, which tells a fork where the seed's memory is, and the messages on the channel."""

import struct
from collections.abc import Mapping, Sequence

from attrs import frozen

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.process import process_token
from tensorfork.memory import cuda
from tensorfork.regions import Region, RemoteRegion

_OFFER = struct.Struct("<16sI")
"""The token of the seed's process, and the number of its GPU regions."""
_EXPORTED = struct.Struct(f"<QQ{cuda.HANDLE_BYTES}s")
"""For each of them: its id, its address in the seed's process, and its handle."""
CPU_REQUEST = struct.Struct("<QQQ")
"""The id of a region on the CPU, the offset in it, and the number of bytes; the answer is the bytes, or `STOP`."""
CPU_CHUNK = 512 << 10
"""Bytes of a CPU region in one message of the channel."""
STOP = b""
"""The seed's word that it serves no more: the lease ends, or a request cannot be answered. No answer is empty."""
RELEASED = b""
"""The fork's last word: it has closed all handles."""


@frozen
class RemoteAllocation:
    """A GPU region of the seed: its address there, and its handle; None if the seed is in this process."""

    address: int
    nbytes: int
    handle: bytes | None


def write_offer(regions: Sequence[Region], handles: Mapping[int, bytes]) -> bytes:
    """The offer for these regions. `handles` are those of the regions' allocations, by address; none for a fork in the
    same process.
    """
    exported = [
        _EXPORTED.pack(region.id, region.address, handles.get(region.address, bytes(cuda.HANDLE_BYTES)))
        for region in regions
        if region.device != "cpu"
    ]
    return _OFFER.pack(process_token(), len(exported)) + b"".join(exported)


def read_offer(offer: bytes, remote: Sequence[RemoteRegion]) -> tuple[bool, dict[int, RemoteAllocation]]:
    """Whether the seed is in this process, and its GPU regions by id. Raises `TransportUnavailable` for a bad offer."""
    if len(offer) < _OFFER.size or (len(offer) - _OFFER.size) % _EXPORTED.size:
        raise TransportUnavailable("what the seed offers is not an offer of cuda_ipc; use one version on both sides")
    seed_process, count = _OFFER.unpack_from(offer)
    sizes = {region.id: region.nbytes for region in remote if region.device != "cpu"}
    exported = list(_EXPORTED.iter_unpack(offer[_OFFER.size :]))
    if len(exported) != count or {id for id, _, _ in exported} != sizes.keys():
        raise TransportUnavailable(
            "the seed's offer over cuda_ipc does not fit its regions; use one version on both sides"
        )
    same_process = seed_process == process_token()
    return same_process, {
        id: RemoteAllocation(address, sizes[id], None if same_process else handle) for id, address, handle in exported
    }
