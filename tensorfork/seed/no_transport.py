"""A lease over no transport: the promise of a generation to a process that asks for digests and copies no bytes."""

from collections.abc import Sequence
from typing import NoReturn

from tensorfork.errors import TransportUnavailable
from tensorfork.regions import Region, RemoteRegion
from tensorfork.transports.base import Channel, Export, Facts, Site, Transport
from tensorfork.wire.messages import NO_TRANSPORT


class NoTransport(Transport):
    """Exports nothing. Its leases are granted, checked and ended like others; no memory can be read under them."""

    name = NO_TRANSPORT

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        """See `Transport.export`."""
        return _Nothing()

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> NoReturn:
        """Not for forks: raises `TransportUnavailable`."""
        raise TransportUnavailable("a lease over no transport moves no bytes")


class _Nothing(Export):
    offer = b""

    def serve(self, channel: Channel) -> None:
        """Nobody reads."""

    def close(self, deadline: float) -> bool:
        """Nobody can reach any memory."""
        return True
