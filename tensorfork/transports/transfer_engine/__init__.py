"""One-sided reads by Mooncake's TransferEngine: over RDMA, over NVLink within a host, or over TCP.

The seed registers its memory with an engine and takes no further part; the fork's engine reads. An engine listens on
all interfaces, without authentication. docs/transfer_engine.md says what it needs, and who can reach what through it.
"""

import time
import weakref
from collections.abc import Sequence
from typing import ClassVar

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.memory.allocations import PublishedAllocations
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.sockets.address import local_address
from tensorfork.transports.base import Channel, Facts, Site, Transport
from tensorfork.transports.data_port import reach_data_port
from tensorfork.transports.rate_limit import rate_limit as checked
from tensorfork.transports.transfer_engine import engine, fabrics, library
from tensorfork.transports.transfer_engine.enclosing import enclosing_regions
from tensorfork.transports.transfer_engine.engine import FABRICS, RemoteEngine
from tensorfork.transports.transfer_engine.export import EngineExport, Offer, pack_offer
from tensorfork.transports.transfer_engine.registration_cache import RegistrationCache
from tensorfork.transports.transfer_engine.session import EngineSession
from tensorfork.transports.transfer_engine.undrained import undrained_reads

__all__ = ["TransferEngine"]

DEFAULT_FABRICS = ("nvlink", "rdma")
OPEN_PORTS = "open those that Mooncake chooses from, MC_MIN_RPC_PORT to MC_MAX_RPC_PORT (15000 to 17000)"
"""What helps where the seed's engine cannot be reached."""


class TransferEngine(Transport):
    """Mooncake's TransferEngine.

    Args:
        fabric: "rdma", "nvlink" or "tcp", or several in order of preference. By default nvlink or rdma, whichever the
            two sides can use. tcp must be named on both sides, because nothing protects its ports.
        rate_limit: bytes a second that this fork reads at most; no limit by default. A seed's is
            ``publish(rate_limit=)``; the smaller one counts.
        keep_registered: whether a seed's memory stays registered from its first lease until the seed is closed, so that
            later leases begin at once, or only during a lease. By default it stays registered for rdma, where
            registering takes seconds, and for nvlink, where a step of the seed waits milliseconds for it and
            unregistering would revoke nothing. For tcp it does not, because everybody who reaches the port can access
            it.
        nics: names of the RDMA NICs to use, such as "mlx5_0"; all by default.
        piece: bytes of one read at most, 1 MiB or more.
    """

    name: ClassVar[str] = "transfer_engine"
    rate_limited_by = "fork"

    def __init__(
        self,
        *,
        fabric: str | Sequence[str] | None = None,
        rate_limit: float | None = None,
        keep_registered: bool | None = None,
        nics: Sequence[str] = (),
        piece: int | None = None,
    ) -> None:
        names = DEFAULT_FABRICS if fabric is None else (fabric,) if isinstance(fabric, str) else tuple(fabric)
        for one in names:
            if one not in FABRICS:
                raise ValueError(f"{one!r} is not a fabric of transfer_engine; those are {', '.join(FABRICS)}")
        if piece is not None and piece < 1 << 20:
            raise ValueError(f"piece must be 1 MiB or more, not {piece} bytes")
        if isinstance(nics, str):
            raise TypeError(f"nics must be a sequence of names; write [{nics!r}]")
        self._fabrics, self._nics = names, tuple(nics)
        self._rate, self._keep_registered = checked(rate_limit), keep_registered
        self.piece = piece or ((32 << 20) if names == ("tcp",) else (256 << 20))
        if self._rate is not None:
            self.piece = self.limited_piece(self._rate)
        self._published = PublishedAllocations()
        self._cache = RegistrationCache()
        weakref.finalize(self, self._cache.forget).atexit = False

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        library.installed_wheel()  # raises before the CUDA driver is asked for anything
        return fabrics.facts(regions, self._published.add(regions), self._fabrics, self._nics)

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """See `Transport.why_not`."""
        try:
            fabrics.choose(fork, seed)
        except TransportUnavailable as error:
            return str(error)
        return None

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """See `Transport.cover`: whole allocations on GPUs; on CPUs, what overlaps and, of many regions, neighbours."""
        return enclosing_regions(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> EngineExport:
        """See `Transport.export`."""
        allocations = self._published.check(regions)
        fabric = fabrics.choose(fork, fabrics.facts(regions, allocations, self._fabrics, self._nics))
        try:
            undrained_reads.wait([(one.address, one.nbytes) for one in regions], time.monotonic(), lambda: False)
        except TransferFailed as error:
            raise TransportUnavailable(str(error)) from error
        local = engine.get_engine(fabric, site.host, self._nics)
        if fabric != "tcp" if self._keep_registered is None else self._keep_registered:
            registration, offer = self._cache.acquire(local, regions, allocations, deadline)
            return EngineExport(local, registration, offer, stays_registered=True)
        registration = local.registrations.acquire(regions, deadline)
        return EngineExport(local, registration, pack_offer(local, registration, regions), stays_registered=False)

    def forget(self, regions: Sequence[Region]) -> None:
        """See `Transport.forget`: nothing stays registered for a seed that is closed."""
        self._cache.forget(regions)

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> EngineSession:
        """See `Transport.open`."""
        offered = Offer.unpack(offer)
        if offered.fabric not in self._fabrics:
            raise TransportUnavailable(f"the seed offers {offered.fabric}, which was not asked for")
        if offered.fabric == "nvlink" and "cpu" in {*(one.device for one in remote), *(one.device for one in regions)}:
            raise TransportUnavailable("the seed offers nvlink, which carries the memory of GPUs alone")
        if missing := {region.id for region in remote} - offered.regions.keys():
            raise TransportUnavailable(f"the seed's offer for transfer_engine lacks {len(missing)} of its regions")
        address = reach_data_port(self.name, host, offered.port, channel, deadline, OPEN_PORTS)
        local = engine.local_engine(offered.nonce)
        if local is None:
            local = engine.get_engine(offered.fabric, local_address(address.host), self._nics)
        peer = local.address_of(RemoteEngine(address.host, offered.port, offered.nonce, offered.fingerprint))
        session = EngineSession(
            local, peer, offered.regions, remote, regions, channel, piece=self.piece, rate=self._rate
        )
        session.start(deadline)
        return session
