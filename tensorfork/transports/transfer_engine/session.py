"""The fork's side of a lease."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event

from tensorfork.errors import LeaseEnded, PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import LeaseEnd, check_bounds, check_going_on
from tensorfork.transports.rate_limit import RateLimiter, smaller
from tensorfork.transports.transfer_engine.engine import Engine
from tensorfork.transports.transfer_engine.export import READS_DONE, OfferedRegion
from tensorfork.transports.transfer_engine.handshake import Handshake
from tensorfork.transports.transfer_engine.nvlink import NvlinkReader
from tensorfork.transports.transfer_engine.reads import reads_of
from tensorfork.transports.transfer_engine.registrations import Registration
from tensorfork.transports.transfer_engine.undrained import InFlightRead, undrained_reads
from tensorfork.transports.transfer_engine.windowed import WindowedReader

log = logging.getLogger("tensorfork")

CONNECT_TIMEOUT = 30.0
"""Seconds for the first byte, where the deadline is later, so that a closed port does not cost minutes."""
DRAIN_AFTER_DEADLINE = 0.5
"""Seconds beyond the deadline that a failed pull waits for its reads to be over."""
DRAIN_TIMEOUT = 2.0
"""Seconds, within the deadline, that a failed pull waits for that."""


class EngineSession(Session):
    """One lease, read through the process's engine.

    Args:
        engine: reads.
        address: of the seed's engine, by `Engine.address_of`.
        offered: the seed's regions, by id.
        remote: the same, as they were leased.
        regions: ours, which are read into.
        channel: to the seed.
        piece: bytes of one read, at most.
        rate: the fork's own limit, in bytes a second; None for none. It obeys the seed's, too.
    """

    def __init__(
        self,
        engine: Engine,
        address: str,
        offered: dict[int, OfferedRegion],
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        *,
        piece: int,
        rate: float | None,
    ) -> None:
        self.fabric = engine.fabric
        self._engine, self._channel = engine, channel
        self._offered = offered
        self._remote = {region.id: region for region in remote}
        self._regions = {region.id: region for region in regions}
        self._gpus = sorted({region.device for region in regions} - {"cpu"})
        self._piece = piece
        still_leased = LeaseEnd(channel).check
        limiter = RateLimiter(lambda: smaller(rate, channel.rate_limit))
        self._nvlink = NvlinkReader(engine, address, self._gpus, limiter, still_leased)
        self._windowed = WindowedReader(engine, address, self._gpus, limiter, still_leased)
        self._registration: Registration | None = None
        self._handshake: Handshake | None = None
        self._ready_called = self._closed = False
        self._may_still_read = False
        """Whether a read may be in flight when this closes. The seed is not sent `READS_DONE` then."""

    def start(self, deadline: float) -> None:
        """Register our regions, where the fabric needs that, and read a byte to see that it works.

        Over nvlink, the handshake that reads it is only begun, and `ready` waits for it.

        Raises `TransportUnavailable`, and leaves nothing registered, where it does not work.
        """
        connect_deadline = min(deadline, time.monotonic() + CONNECT_TIMEOUT)
        with self._close_on_error(deadline):
            if self.fabric == "rdma":
                self._registration = self._engine.registrations.acquire(list(self._regions.values()), deadline)
            if self.fabric == "nvlink":
                sources = [self._offered[region.id].address for region in self._remote.values() if region.nbytes]
                self._handshake = Handshake(
                    self._engine,
                    lambda connected: self._nvlink.open_handles(sources, connect_deadline, connected),
                    self._channel.check,
                )
                return
            for remote in {region.device: region for region in self._remote.values() if region.nbytes}.values():
                for device in sorted({region.device for region in self._regions.values()}):
                    self._probe(self._offered[remote.id].address, device, connect_deadline)

    def ready(self, deadline: float) -> None:
        """See `Session.ready`."""
        if self._handshake is not None and not self._ready_called:
            self._ready_called = True
            with self._close_on_error(deadline):
                self._handshake.wait_connected(min(deadline, time.monotonic() + CONNECT_TIMEOUT))

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        check_going_on(deadline, cancel)
        self.ready(deadline)
        for copy in copies:
            check_bounds(copy, self._remote, self._regions)
        targets = [(self._regions[copy.into].address + copy.at, copy.nbytes) for copy in copies]
        undrained_reads.wait(targets, deadline, cancel.is_set)
        check_going_on(deadline, cancel)
        self._engine.synchronize(self._gpus)  # work of this process may still use the memory that is written now
        if self.fabric == "nvlink":
            self._nvlink.stop_opening()
            reads = reads_of(copies, self._regions, self._offered, self._piece)
            self._nvlink.read(reads, len(copies), deadline, done, cancel)
            return
        in_flight: deque[InFlightRead] = deque()
        try:
            reads = reads_of(copies, self._regions, self._offered, self._piece)
            self._windowed.read(reads, len(copies), in_flight, deadline, done, cancel)
        except BaseException as error:
            running = self._drain(in_flight, deadline)
            if isinstance(error, TransferFailed):
                undrained = [(read.address, read.nbytes) for read in running]
                raise TransferFailed(str(error), undrained=undrained) from error
            raise

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._handshake is not None:
                self._nvlink.stop_opening()
                now = time.monotonic()
                self._handshake.wait_finished(min(max(deadline, now + DRAIN_AFTER_DEADLINE), now + DRAIN_TIMEOUT))
        except Exception as error:  # not raised: the lease is over
            log.info("opening handles over nvlink failed: %s", error)
            self._may_still_read = self._engine.broken
        finally:
            if self._registration is not None:
                self._registration.release()
            if not self._may_still_read:
                with suppress(PeerUnreachable):  # a seed that is gone needs no message
                    self._channel.send(READS_DONE, max(deadline, time.monotonic() + 0.2))

    @contextmanager
    def _close_on_error(self, deadline: float) -> Iterator[None]:
        """An error inside closes the session. `TransferFailed` becomes `TransportUnavailable`."""
        try:
            yield
        except BaseException as error:
            self._may_still_read = self._engine.broken
            self.close(deadline)
            if isinstance(error, TransferFailed | LeaseEnded):
                raise TransportUnavailable(f"transfer_engine over {self.fabric} does not work here: {error}") from error
            raise

    def _probe(self, source: int, device: str, deadline: float) -> None:
        handshake = Handshake(
            self._engine, lambda connected: self._windowed.probe(source, device, deadline), self._channel.check
        )
        handshake.wait_finished(deadline)

    def _drain(self, in_flight: Sequence[InFlightRead], deadline: float) -> list[InFlightRead]:
        """Wait a little for reads to be over, and return those that are not.

        `undrained_reads` polls those from then on; it keeps our regions alive, and registered, until all are over.
        """
        now = time.monotonic()
        running = list(in_flight)
        try:
            self._windowed.drain(running, max(now + DRAIN_AFTER_DEADLINE, min(deadline, now + DRAIN_TIMEOUT)))
        finally:
            if running:
                self._may_still_read = True
                registration, self._registration = self._registration, None
                owners = [region.owner for region in self._regions.values()]
                on_drained = registration.release if registration else None
                undrained_reads.add(running, self._engine.status, on_drained, owners)
        return running
