"""The seed's service: it answers forks, grants leases, and serves each of them.

Nothing here waits for the engine or makes it wait. The listener's thread answers requests from cached bytes, each lease
has two threads of its own, and digests are computed on another (`tensorfork.seed.digests`).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tensorfork.digest import definition
from tensorfork.errors import PeerUnreachable, TensorForkError, TransportUnavailable
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.layout import ModelLayout
from tensorfork.memory import cuda
from tensorfork.model.describe import ModelMemory
from tensorfork.regions import Region, RemoteRegion
from tensorfork.seed.digests import DigestCache
from tensorfork.seed.generation import SeqLock
from tensorfork.seed.leases import MAX_LEASES, Lease, SeedStats
from tensorfork.sockets.address import Address
from tensorfork.transports.base import Export, Site, Transport
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.listener import Listener, SeedChannel, SendReply

log = logging.getLogger("tensorfork")


LIVENESS_INTERVAL = 2.0
"""Seconds between two checks that the forks that hold leases are still connected."""

CLOSE_TIMEOUT = 5.0
"""Seconds that `close` waits for its threads."""


class SeedService:
    """Answers forks, for a `Seed`.

    Its threads hold the service and not the `Seed`: a `Seed` that the caller has dropped is garbage-collected, and so
    closed, even while forks are using it.
    """

    def __init__(
        self,
        layout: ModelLayout,
        tensors: Mapping[str, torch.Tensor],
        memory: ModelMemory,
        transports: Mapping[str, Transport],
        bind: str,
        advertise: str | None,
    ) -> None:
        """Bind and start answering. Raises `ValueError` for an address that cannot be, `OSError` for one in use."""
        self._layout, self._transports = layout, transports
        self._keep_alive = tensors, memory
        self._regions = memory.regions(layout)
        gpus = frozenset(torch.device(s.device) for s in layout.storages if s.device.startswith("cuda"))
        self.seqlock = SeqLock(gpus)
        self._digests = DigestCache(tensors, self.seqlock)
        self._covered: dict[str, tuple[Sequence[Region], list[bytes]]] = {}
        self._leases: dict[bytes, Lease] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._granted = self._refused = self._expired = 0
        self._next_liveness_check = 0.0
        self._layout_pages = tables.pack_layout(layout)
        self._welcome = self._make_welcome()
        bound = Address.parse(bind)
        advertised = None if advertise is None else _parse_advertised(advertise)
        if bound.is_wildcard and advertised is None:
            raise ValueError(f"bind={bind!r} is every interface; say with advertise= by which address forks reach it")
        self._listener = Listener(bound, self._on_request, self._on_gone)
        host, port = advertised or (self._listener.address.host, None)
        self.address = Address(host, self._listener.address.port if port is None else port)
        self._site = Site(bound.host, host)
        self._listener.start(self._check_leases)

    def stats(self) -> SeedStats:
        """See `Seed.stats`."""
        with self._lock:
            return SeedStats(self._granted, self._refused, len(self._leases), self._expired, self._digests.computed)

    def close(self, deadline: float) -> None:
        """Stop answering, end all leases, and wait for their threads until the deadline."""
        self._digests.close()
        self._listener.close(deadline)  # first, so that no lease is granted any more
        with self._lock:
            leases, threads = list(self._leases.values()), list(self._threads)
        for lease in leases:
            lease.end()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for transport in self._transports.values():
            transport.forget(self._regions)

    # Requests, on the listener's thread.

    def _make_welcome(self) -> messages.Welcome:
        offered = {}
        for name, transport in self._transports.items():
            try:
                offered[name] = messages.Offered(dict(transport.facts(self._regions)), None)
            except TransportUnavailable as error:
                offered[name] = messages.Offered({}, str(error))
        identity, rank = self._layout.identity, self._layout.rank
        return messages.Welcome(
            library=__version__,
            seed=os.urandom(16),
            tensors=len(self._layout.tensors),
            storages=len(self._layout.storages),
            nbytes=self._layout.nbytes,
            digest=definition.NAME,
            transports=offered,
            identity=None if identity is None else identity.as_dict(),
            rank=None if rank is None else dict(rank.as_dict()),
        )

    def _on_request(self, peer: bytes, message: Any, payload: bytes, reply: SendReply) -> None:
        match message:
            case messages.Hello():
                reply(self._welcome)
            case messages.GetLayout():
                reply(*self._layout_pages)
            case messages.TakeLease():
                self._grant_lease(peer, message, reply)
            case messages.Say():
                lease = self._leases.get(message.lease)
                if lease is not None and not lease.channel.deliver(payload):
                    log.warning("a fork sends more messages than its transport reads; its lease is ended")
                    lease.end()
            case messages.GetDigests():
                if lease := self._running_lease(message.lease, reply):
                    self._digests.request(lease.generation, reply)
            case messages.CheckLease():
                if lease := self._running_lease(message.lease, reply):
                    reply(messages.Checked(self.seqlock.generation))
                    if message.release:
                        lease.end()

    def _running_lease(self, id: bytes, reply: SendReply) -> Lease | None:
        """The lease with this id. None if it has ended; the fork is told so."""
        lease = self._leases.get(id)
        if lease is None or lease.ended.is_set():
            reply(messages.Refused(messages.UNKNOWN, "the lease has ended; it lasts as long as the fork's timeout"))
            return None
        return lease

    def _grant_lease(self, peer: bytes, request: messages.TakeLease, reply: SendReply) -> None:
        """Register a lease, and start the thread that replies to the fork; or refuse it."""
        generation = self.seqlock.generation
        if refused := self._reason_to_refuse(request, generation):
            self._refused += 1
            reply(refused)
            return
        id = os.urandom(16)
        lease = Lease(id, peer, generation, time.monotonic() + request.seconds, SeedChannel(self._listener, peer, id))
        if request.digests:
            self._digests.start()
        with self._lock:
            self._leases[id] = lease
        self._start_thread("tensorfork-lease", lambda: self._run_lease(lease, request, reply))

    def _reason_to_refuse(self, request: messages.TakeLease, generation: int) -> messages.Refused | None:
        offered = self._welcome.transports.get(request.transport)
        if generation % 2:
            return messages.Refused(messages.CHANGED, "the seed's weights are being changed; try again")
        if len(self._leases) >= MAX_LEASES:
            return messages.Refused(messages.BUSY, f"the seed has {MAX_LEASES} forks already; try again")
        if offered is None:
            names = ", ".join(self._transports) or "none"
            reason = f"the seed does not offer {request.transport!r}; it has: {names}"
            return messages.Refused(messages.UNAVAILABLE, reason)
        if offered.why_not is not None:
            return messages.Refused(messages.UNAVAILABLE, offered.why_not)
        return None

    # A lease, on its two threads.

    def _start_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            cuda.relax_capture()
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
        return thread

    def _run_lease(self, lease: Lease, request: messages.TakeLease, reply: SendReply) -> None:
        """A lease from its export to its end."""
        transport = self._transports[request.transport]
        try:
            regions, pages = self._cover(transport)
            export = transport.export(regions, self._site, request.facts, lease.expires)
        except Exception as error:
            if not isinstance(error, TensorForkError):
                log.exception("the transport %s failed to export", transport.name)
            self._refused += 1
            self._remove(lease)
            reply(messages.Refused(messages.UNAVAILABLE, f"the seed cannot export over {transport.name}: {error}"))
            return
        self._granted += 1
        serving = self._start_thread("tensorfork-serve", lambda: self._serve(export, lease))
        reply(messages.Leased(lease.id, lease.generation, export.offer, len(pages)), pages)
        lease.ended.wait()
        if not export.close(time.monotonic() + CLOSE_TIMEOUT):
            log.info("a lease over %s has ended; its reader can still reach the memory", transport.name)
        serving.join(CLOSE_TIMEOUT)
        self._remove(lease)

    def _cover(self, transport: Transport) -> tuple[Sequence[Region], list[bytes]]:
        """The regions that `Transport.cover` returns, and the pages that tell forks of them: equal for all leases."""
        if transport.name not in self._covered:
            with gc_paused():  # a full collection would stop the engine for as long as it takes
                regions, places = transport.cover(self._regions)
                remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
                by_storage = {region.id: place for region, place in zip(self._regions, places, strict=True)}
                self._covered[transport.name] = regions, tables.pack_places(remote, by_storage)
                del remote, places, by_storage
        return self._covered[transport.name]

    def _serve(self, export: Export, lease: Lease) -> None:
        try:
            export.serve(lease.channel)
        except PeerUnreachable as error:
            log.info("a fork went away: %s", error)
            lease.end()
        except Exception:
            log.exception("serving a fork failed; its lease is ended")
            lease.end()

    def _remove(self, lease: Lease) -> None:
        lease.end()
        with self._lock:
            self._leases.pop(lease.id, None)

    # The ends of leases, on the listener's thread.

    def _check_leases(self) -> float | None:
        """End the leases that have expired, and those whose forks are gone. Returns when to check again."""
        with self._lock:
            leases = [lease for lease in self._leases.values() if not lease.ended.is_set()]
        now = time.monotonic()
        if leases and now >= self._next_liveness_check:
            self._next_liveness_check = now + LIVENESS_INTERVAL
            for lease in leases:  # it answers no request; if the fork is gone, sending it calls `_on_gone`
                self._listener.send(lease.peer, messages.Checked(self.seqlock.generation))
        for lease in leases:
            if lease.expires <= now:
                self._expired += 1
                lease.end()
        expiring = [lease.expires for lease in leases if lease.expires > now]
        return min([self._next_liveness_check, *expiring]) if leases else None

    def _on_gone(self, peer: bytes) -> None:
        with self._lock:
            leases = [lease for lease in self._leases.values() if lease.peer == peer]
        for lease in leases:
            log.info("a fork has gone away; its lease is ended")
            lease.end()


def _parse_advertised(text: str) -> tuple[str, int | None]:
    """The host and the port of `publish(advertise=)`; the port is None where only a host is given."""
    bare = text.removeprefix("tcp://")
    for form in (text, f"{bare}:*", f"[{bare}]:*"):
        try:
            address = Address.parse(form)
        except ValueError:
            continue
        if not address.is_wildcard:
            return address.host, address.port
    raise ValueError(f"advertise={text!r} is not an address by which forks can come; give a host, or host:port")
