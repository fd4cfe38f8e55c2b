"""The seed's side of a lease: memory registered for one fork, and the offer that the fork is sent."""

import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from attrs import frozen

from tensorfork.errors import PeerUnreachable, TransportUnavailable
from tensorfork.regions import Region
from tensorfork.transports.base import Channel, Export
from tensorfork.transports.transfer_engine.engine import FABRICS, Engine
from tensorfork.transports.transfer_engine.registrations import Registration

READS_DONE = b"quiet"
"""The message of a fork that will not read from the seed any more, and has no read in flight."""
STOP = b"stop"
"""The message of a seed that ends a lease whose fork may still read."""
RECV_TIMEOUT = 0.25
"""Seconds that `serve` waits for a message before it checks whether the lease has ended."""
LAST_MESSAGE_TIMEOUT = 0.02
"""Seconds that `close` waits for a message that has come and not been read, before it tells the fork to stop."""
STOP_TIMEOUT = 1.0
"""Seconds that it waits for a fork that was told to stop."""
_MAGIC = b"tfTE1"
_HEADER = struct.Struct("<5sB8s8sHI")
_REGION = struct.Struct("<QQI")
_BOUNDARY = struct.Struct("<Q")


@frozen
class OfferedRegion:
    """The address of a region in the seed's process, and the offsets in it that no read may cross."""

    address: int
    boundaries: tuple[int, ...]


@frozen
class Offer:
    """What a fork needs to read: the seed's engine, and the leased regions by id.

    `nonce` and `fingerprint` are those of `RemoteEngine`.
    """

    fabric: str
    nonce: bytes
    fingerprint: bytes
    port: int
    regions: dict[int, OfferedRegion]

    def pack(self) -> bytes:
        """As bytes."""
        parts = [
            _HEADER.pack(_MAGIC, FABRICS.index(self.fabric), self.nonce, self.fingerprint, self.port, len(self.regions))
        ]
        for id, region in self.regions.items():
            parts.append(_REGION.pack(id, region.address, len(region.boundaries)))
            parts += map(_BOUNDARY.pack, region.boundaries)
        return b"".join(parts)

    @classmethod
    def unpack(cls, packed: bytes) -> "Offer":
        """From bytes. Raises `TransportUnavailable` for anything that `pack` does not produce."""
        try:
            magic, fabric, nonce, fingerprint, port, count = _HEADER.unpack_from(packed)
            if magic != _MAGIC:
                raise TransportUnavailable("the seed's offer for transfer_engine is something else")
            at, regions = _HEADER.size, {}
            for _ in range(count):
                id, address, boundaries = _REGION.unpack_from(packed, at)
                at += _REGION.size
                end = at + boundaries * _BOUNDARY.size
                offsets = tuple(offset for (offset,) in _BOUNDARY.iter_unpack(packed[at:end]))
                regions[id] = OfferedRegion(address, offsets)
                if end > len(packed):
                    raise TransportUnavailable("the seed's offer for transfer_engine ends in the middle")
                at = end
            return cls(FABRICS[fabric], nonce, fingerprint, port, regions)
        except (struct.error, IndexError) as error:
            raise TransportUnavailable(
                f"the seed's offer for transfer_engine cannot be read ({error}); use the same version of tensorfork"
            ) from error


def pack_offer(engine: Engine, registration: Registration, regions: Sequence[Region]) -> bytes:
    """The offer, packed, of regions that are registered with an engine."""
    fingerprint = b"" if engine.fabric == "tcp" else registration.fingerprint(by_mapping=engine.fabric == "nvlink")
    offered = {region.id: OfferedRegion(region.address, tuple(registration.boundaries(region))) for region in regions}
    return Offer(engine.fabric, engine.nonce, fingerprint.ljust(8, b"\0"), engine.port, offered).pack()


class EngineExport(Export):
    """One lease.

    Args:
        engine: what the memory is registered with.
        registration: released when the lease ends.
        offer: what the fork is sent, packed.
        stays_registered: whether the memory stays registered after the release.
    """

    def __init__(self, engine: Engine, registration: Registration, offer: bytes, *, stays_registered: bool) -> None:
        self.offer = offer
        self._engine, self._registration, self._stays_registered = engine, registration, stays_registered
        self._closed, self._serve_ended = threading.Event(), threading.Event()
        self._reads_done = False
        self._channel: Channel | None = None

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`. The engine serves the reads; this only waits for the fork's `READS_DONE`."""
        self._channel = channel
        try:
            while not self._closed.is_set():
                until = time.monotonic() + RECV_TIMEOUT
                try:
                    self._reads_done = channel.recv(until) == READS_DONE
                    return
                except PeerUnreachable:
                    if time.monotonic() < until:
                        return  # the lease has ended without a message
        finally:
            self._serve_ended.set()

    def close(self, deadline: float) -> bool:
        """See `Export.close`. A fork that still reads is told to stop, and waited for, where the channel allows it.

        Over tcp, memory that is not registered cannot be read, but a read in flight is served to its end: True if the
        fork has sent `READS_DONE`. Over rdma, the NIC refuses reads from now on, unless the memory stays registered.
        Over nvlink, the fork's engine keeps the memory mapped until its process ends, and nothing can revoke that.
        """
        if self._channel is not None and not self._serve_ended.wait(_seconds(deadline, LAST_MESSAGE_TIMEOUT)):
            with suppress(PeerUnreachable):
                self._channel.send(STOP, deadline)
            self._serve_ended.wait(_seconds(deadline, STOP_TIMEOUT))
        self._closed.set()
        self._registration.release()
        if self._stays_registered or self._engine.fabric == "nvlink":
            return False
        return self._engine.fabric == "rdma" or self._reads_done


def _seconds(deadline: float, most: float) -> float:
    return max(0.0, min(deadline - time.monotonic(), most))
