"""A seed's side of leases in this process: memory and a transport, without a model or a published seed."""

import threading
import time
import traceback
from collections.abc import Sequence
from typing import Protocol

from attrs import define, evolve, frozen

from tensorfork import Export, Facts, PeerUnreachable, Place, RemoteRegion, Site, Transport
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import Port
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory

SITE = Site("127.0.0.1", "127.0.0.1")


@frozen
class GrantedLease:
    """What a fork is told when it is granted a lease; `number` is the lease's at its seed, `seed` the seed's port."""

    number: int
    seed: Address
    offer: bytes
    remote: Sequence[RemoteRegion]
    places: Sequence[Place]


@frozen
class LeaseEnding:
    """How a lease ended at the seed: what `Export.close` returned, whether `Export.serve` returned, and the traceback
    of what that raised.
    """

    closed: bool
    serve_returned: bool
    serve_error: str | None


@define
class _ServedLease:
    export: Export
    channel: QueueChannel
    thread: threading.Thread | None
    error: str | None = None


class SeedSide(Protocol):
    """A seed's side of leases, in this process or in another."""

    def facts(self) -> Facts:
        """The facts that the seed would send in its welcome."""

    def fill(self, number: int) -> None:
        """Change the contents of all regions to those of this number."""

    def unmap(self) -> None:
        """See `GuardedMemory.unmap`."""

    def map(self) -> None:
        """See `GuardedMemory.map`."""

    def first_difference(self) -> str | None:
        """See `GuardedMemory.first_difference`."""

    def grant_lease(self, fork: Facts, seconds: float, serve: bool, fork_channel: QueueChannel) -> GrantedLease:
        """Grant a lease as a seed does: cover, export, and with `serve` run `Export.serve` on a thread. Connects the
        fork's end of the lease's channel.
        """

    def end_lease(self, number: int, seconds: float) -> LeaseEnding:
        """End a lease as a seed does."""


class LocalSeed:
    """A seed's side of leases, in this process; see `SeedSide`."""

    def __init__(
        self,
        transport: Transport,
        device: str,
        sizes: Sequence[int],
        number: int,
        published: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self._transport, self.number = transport, number
        self._memory = GuardedMemory(device, sizes, number)
        self._memory.published = published
        self._served: dict[int, _ServedLease] = {}
        self._port: Port | None = None
        self._running = 0

    def facts(self) -> Facts:
        """See `SeedSide`."""
        return dict(self._transport.facts(self._memory.regions))

    def fill(self, number: int) -> None:
        """See `SeedSide`."""
        self._memory.fill(number)

    def unmap(self) -> None:
        """See `SeedSide`."""
        self._memory.unmap()

    def map(self) -> None:
        """See `SeedSide`."""
        self._memory.map()

    def first_difference(self) -> str | None:
        """See `SeedSide`."""
        return self._memory.first_difference()

    def grant_lease(self, fork: Facts, seconds: float, serve: bool, fork_channel: QueueChannel) -> GrantedLease:
        """See `SeedSide`."""
        seed_channel = QueueChannel(fork_channel.deliver)
        fork_channel.connect(seed_channel.deliver)
        return self.grant_lease_on(seed_channel, fork, seconds, serve)

    def grant_lease_on(self, channel: QueueChannel, fork: Facts, seconds: float, serve: bool) -> GrantedLease:
        """Grant a lease; `channel` is the seed's end of its channel, which the caller has connected."""
        regions, places = self._transport.cover(self._memory.regions)
        if self._port is None:
            self._port = Port(Address(SITE.bind, None))
            self._port.start()
        export = self._transport.export(regions, evolve(SITE, port=self._port), fork, time.monotonic() + seconds)
        self._running += 1
        number = len(self._served)
        served = self._served[number] = _ServedLease(export, channel, None)
        remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
        if serve:
            _start_serving(served)
        return GrantedLease(number, self._port.address, bytes(export.offer), remote, list(places))

    def end_lease(self, number: int, seconds: float) -> LeaseEnding:
        """See `SeedSide`."""
        served = self._served[number]
        served.channel.end()
        closed = served.export.close(time.monotonic() + seconds)
        # A seed may be about to serve when the lease ends; `serve` must then return at once.
        thread = _start_serving(served) if served.thread is None else served.thread
        thread.join(seconds)
        self._running -= 1
        if not self._running and self._port is not None:
            self._port.close(time.monotonic() + seconds)
            self._port = None
        return LeaseEnding(closed, not thread.is_alive(), served.error)


def _start_serving(served: _ServedLease) -> threading.Thread:
    thread = served.thread = threading.Thread(target=_serve, args=(served,), name="suite-serve", daemon=True)
    thread.start()
    return thread


def _serve(served: _ServedLease) -> None:
    try:
        served.export.serve(served.channel)
    except PeerUnreachable:
        pass  # the channel raises it when the fork is gone or the lease has ended; a seed takes it for the end, too
    except BaseException:
        served.error = traceback.format_exc()
