"""The seed's side of a lease: memory registered for one fork, and what the fork is told of it."""

import struct
import threading
import time
from collections.abc import Sequence

from attrs import frozen

from tensorfork.errors import PeerUnreachable, TransportUnavailable
from tensorfork.regions import Region
from tensorfork.transports.base import Channel, Export
from tensorfork.transports.transfer_engine.engine import FABRICS, Engine
from tensorfork.transports.transfer_engine.registrations import Registration

QUIET = b"quiet"
"""What a fork says when nothing of it reads from the seed any more."""
LISTEN = 0.25
"""Seconds between two looks whether the lease has ended without a word."""
_MAGIC = b"tfTE1"
_HEAD = struct.Struct("<5sB8s8sHI")
_REGION = struct.Struct("<QQI")
_CUT = struct.Struct("<Q")


@frozen
class OfferedRegion:
    """Where a region is in the seed's process, and at which offsets no read may cross."""

    address: int
    cuts: tuple[int, ...]


@frozen
class Offer:
    """What a fork needs: the seed's engine, and its regions by id."""

    fabric: str
    nonce: bytes
    serial: bytes
    port: int
    regions: dict[int, OfferedRegion]

    def pack(self) -> bytes:
        """As bytes."""
        parts = [_HEAD.pack(_MAGIC, FABRICS.index(self.fabric), self.nonce, self.serial, self.port, len(self.regions))]
        for id, region in self.regions.items():
            parts.append(_REGION.pack(id, region.address, len(region.cuts)))
            parts += map(_CUT.pack, region.cuts)
        return b"".join(parts)

    @classmethod
    def unpack(cls, packed: bytes) -> "Offer":
        """From bytes. Raises `TransportUnavailable` for what `pack` does not make."""
        try:
            magic, fabric, nonce, serial, port, count = _HEAD.unpack_from(packed)
            if magic != _MAGIC:
                raise TransportUnavailable("the seed's offer for transfer_engine is something else")
            at, regions = _HEAD.size, {}
            for _ in range(count):
                id, address, cuts = _REGION.unpack_from(packed, at)
                at += _REGION.size
                end = at + cuts * _CUT.size
                regions[id] = OfferedRegion(address, tuple(cut for (cut,) in _CUT.iter_unpack(packed[at:end])))
                if end > len(packed):
                    raise TransportUnavailable("the seed's offer for transfer_engine ends in the middle")
                at = end
            return cls(FABRICS[fabric], nonce, serial, port, regions)
        except (struct.error, IndexError) as error:
            raise TransportUnavailable(
                f"the seed's offer for transfer_engine cannot be read ({error}); use the same version of tensorfork"
            ) from error


def offer(engine: Engine, holding: Registration, regions: Sequence[Region]) -> bytes:
    """What forks are told of regions that are held."""
    serial = b"" if engine.fabric == "tcp" else holding.serial(by_mapping=engine.fabric == "nvlink")
    offered = {region.id: OfferedRegion(region.address, tuple(holding.cuts(region))) for region in regions}
    return Offer(engine.fabric, engine.nonce, serial.ljust(8, b"\0"), engine.port, offered).pack()


class EngineExport(Export):
    """One lease, which releases `holding`. `kept` says that the registration outlives it."""

    def __init__(self, engine: Engine, holding: Registration, offer: bytes, *, kept: bool) -> None:
        self.offer = offer
        self._engine, self._holding, self._kept = engine, holding, kept
        self._ended, self._serving = threading.Event(), threading.Event()
        self._served = threading.Event()
        self._quiet = False

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`: the engine serves; this waits for the fork to say that it has read enough."""
        self._serving.set()
        try:
            while not self._ended.is_set():
                until = time.monotonic() + LISTEN
                try:
                    self._quiet = channel.recv(until) == QUIET
                    return
                except PeerUnreachable:
                    if time.monotonic() < until:
                        return  # the lease has ended without a word
        finally:
            self._served.set()

    def close(self, deadline: float) -> bool:
        """See `Export.close`.

        Over tcp, what is not registered is not served, but a request under way is served to its end: True where the
        fork has said that it has none. Over rdma the NIC refuses from now on, unless the registration is kept. Over
        nvlink the fork's engine keeps the memory mapped for the life of its process, and nothing can revoke that.
        """
        if self._serving.is_set():  # what the fork said last may still be on its way to `serve`
            self._served.wait(max(0.0, min(deadline - time.monotonic(), 4 * LISTEN)))
        self._ended.set()
        self._holding.release()
        if self._kept or self._engine.fabric == "nvlink":
            return False
        return self._engine.fabric == "rdma" or self._quiet
