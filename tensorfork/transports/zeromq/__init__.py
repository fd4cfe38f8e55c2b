"""Bytes over ZeroMQ: works between any two processes that can reach one another, and needs nothing that is optional.

The fork makes further connections to the seed's own port, and requests ranges of the leased regions. The seed copies
them through the kernel into slots of a bounded pool
(`memory.host_slots`), which libzmq sends without another copy, and the fork receives them directly into its regions. So
the seed's process survives memory that is freed or unmapped meanwhile, and answers `MOVED`. Where the owner promises
that nothing moves (`Region.stable`), libzmq is lent the tensors' own memory, and the seed copies only small ranges, of
which many go into one answer.

The fork keeps `WINDOW` requests in flight, so that neither side waits for the next request. The
fork's libzmq stops reading from a connection when a few answers are queued. So neither side ever holds more than that
beyond the model, and a fork that stops reading delays nobody else.

GPU memory passes through a bounded number of pinned buffers on either side: while libzmq sends one, the next is filled.
"""

import os
import struct
from collections.abc import Sequence
from typing import ClassVar

from tensorfork.errors import ProtocolError
from tensorfork.interpreter import process
from tensorfork.regions import Region, RemoteRegion
from tensorfork.transports.base import Channel, Facts, Site, Transport
from tensorfork.transports.zeromq.export import ZeroMQExport
from tensorfork.transports.zeromq.protocol import FRAME, MAX_CONNECTIONS, OFFER
from tensorfork.transports.zeromq.session import ZeroMQSession

__all__ = ["FRAME", "ZeroMQ"]


class ZeroMQ(Transport):
    """The transport that works everywhere.

    Args:
        connections: how many the fork opens to the seed, 1 to 16; by default one for every two cores, and at most 4.
    """

    name: ClassVar[str] = "zeromq"
    rate_limited_by = "seed"
    piece = 16 << 20

    def __init__(self, *, connections: int | None = None) -> None:
        if connections is None:
            connections = max(1, min(4, (os.cpu_count() or 1) // 2))
        if not 1 <= connections <= MAX_CONNECTIONS:
            raise ValueError(f"connections must be 1 to {MAX_CONNECTIONS}, not {connections}")
        self._connections = connections

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`: the id of this host."""
        return {"host": process.host_id()}

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> ZeroMQExport:
        """See `Transport.export`."""
        same_host = fork.get("host") == process.host_id()
        return ZeroMQExport(regions, site, same_host=same_host)

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> ZeroMQSession:
        """See `Transport.open`."""
        try:
            token, frame, alone = OFFER.unpack(offer)
        except struct.error as error:
            raise ProtocolError(f"zeromq: the seed's offer is not one of this transport's: {error}") from error
        if not 0 < frame <= FRAME:
            raise ProtocolError(f"zeromq: the seed offers answers of {frame} bytes, which makes no sense")
        return ZeroMQSession(token, channel.seed, regions, channel, self._connections, frame, alone)
