"""The seed's service: it answers forks, grants leases, and serves each of them.

Nothing here waits for the engine or makes it wait. The listener's thread answers requests from cached bytes, each lease
has two threads of its own, and digests are computed on another (`tensorfork.seed.digests`).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from attrs import evolve

from tensorfork.digest import definition
from tensorfork.digest.record import Digests
from tensorfork.errors import MemoryInUse, PeerUnreachable, SeedMoved
from tensorfork.interpreter import ending
from tensorfork.lineage import Version
from tensorfork.memory import cuda
from tensorfork.model.describe import LocalModel, ModelSource
from tensorfork.seed.address import Advertised
from tensorfork.seed.digests import DigestCache
from tensorfork.seed.leases import ENDED, RELEASED, Lease, LeaseTable, SeedStats
from tensorfork.seed.limits import Limits
from tensorfork.seed.no_transport import NoTransport
from tensorfork.seed.publication import Publication
from tensorfork.seed.published_model import PublishedModel
from tensorfork.seed.rate_shares import RateShares
from tensorfork.seed.refusals import ASLEEP, CHANGED, DRAINING, refusal
from tensorfork.sockets.address import Address
from tensorfork.transports.base import Export, Site, Transport
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.listener import Listener, SeedChannel, SendReply

log = logging.getLogger("tensorfork")


CLOSE_TIMEOUT = 5.0
"""Seconds that `close` waits for its threads, and the end of a lease for its fork."""


class SeedService:
    """Answers forks, for a `Seed`.

    Its threads hold the service and not the `Seed`: a `Seed` that the caller has dropped is garbage-collected, and so
    closed, even while forks are using it.

    Args:
        model: what to publish.
        source: of the same model as it is now; None where it cannot change.
        transports: to offer, by name.
        version: the first that it has.
        stable: whether the owner promises that the tensors' memory stays where it is.
        bound, advertised: as `listening_address` gives them.
        limits: what it grants.
    """

    def __init__(
        self,
        model: LocalModel,
        source: ModelSource | None,
        transports: Mapping[str, Transport],
        version: Version,
        stable: bool,
        bound: Address,
        advertised: Advertised,
        limits: Limits,
    ) -> None:
        """Bind and start answering. Raises `OSError` for an address that is in use, or not one of this host."""
        self._transports = {**transports, NoTransport.name: NoTransport()}
        self._leases, self._limits = LeaseTable(), limits
        self.model = PublishedModel(model, source, transports, version, stable, self._on_replaced)
        self._digests = DigestCache(self.model, self._leases.want_digests)
        self._draining = False
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._id = os.urandom(16)
        self._listener = Listener(bound, self._on_request, self._on_gone, limits.stall, self._has_lease)
        host, port = advertised or (self._listener.address.host, None)
        self.address = Address(host, self._listener.address.port if port is None else port)
        self._rates = RateShares(limits.rate_limit, self._tell_share)
        self._site = Site(bound.host, host, limiter=self._rates.limiter, port=self._listener.port, stall=limits.stall)
        self._listener.start(self._check_leases)

    @property
    def version(self) -> Version:
        """See `Seed.version`."""
        return evolve(self.model.version, content=self._digests.content(self.model.generation))

    def digests(self) -> Digests:
        """See `Seed.digests`."""
        return self._digests.record()

    def stats(self) -> SeedStats:
        """See `Seed.stats`."""
        leases, sent = self._leases, self._rates.limiter.spent
        return SeedStats(leases.granted, leases.refused, len(leases), leases.expired, self._digests.computed, sent)

    def close(self, deadline: float) -> None:
        """Stop answering, end all leases, and wait for their threads until the deadline."""
        self._draining = True
        self._digests.close()
        self._listener.close(deadline)  # first, so that no lease is granted any more
        for lease in self._leases.running():
            lease.end(gone=True)  # without the listener, no fork can be told anything
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._digests.wait(deadline)
        self.model.forget_replaced()
        self.model.forget()

    # Suspending, and draining.

    def suspend(self, deadline: float) -> None:
        """See `Seed.suspend`."""
        self.model.suspend()
        self._leases.end_all(ASLEEP)
        self._leases.wait_until_unused(deadline, readers=True)
        users = self._leases.users()
        if not self._digests.wait(deadline):
            users.append("the thread that computes digests")
        if users:
            raise MemoryInUse(
                f"the model's memory can still be read by: {'; '.join(users[:10])}. Do not unmap it. The seed stays "
                "suspended; call suspend() again to wait longer, end those processes, or call resume()",
                users=users,
            )
        self.model.forget()

    def resume(self) -> None:
        """See `Seed.resume`."""
        self._draining = False
        self.model.resume()

    def drain(self, deadline: float) -> bool:
        """See `Seed.drain`."""
        self._draining = True
        return self._leases.wait_until_unused(deadline, readers=False)

    # Requests, on the listener's thread.

    def _welcome(self, publication: Publication) -> messages.Welcome:
        layout = publication.layout
        return messages.Welcome(
            library=__version__,
            seed=self._id,
            tensors=len(layout.tensors),
            storages=len(layout.storages),
            nbytes=layout.nbytes,
            digest=definition.NAME,
            transports=dict(publication.offered),
            publication=publication.number,
            version=tables.pack_version(self.version),
            identity=tables.pack_identity(layout.identity),
            rank=tables.pack_rank(layout.rank),
            left_out=len(layout.left_out),
        )

    def _on_request(self, peer: bytes, message: Any, payload: bytes, reply: SendReply) -> None:
        match message:
            case messages.Hello():
                reply(self._welcome(self.model.publication))
            case messages.GetLayout():
                publication = self.model.publication
                if message.publication in (None, publication.number):
                    reply(*publication.pages)
                else:
                    reply(CHANGED)
            case messages.TakeLease():
                self._grant_lease(peer, message, reply)
            case messages.Say():
                lease = self._leases.get(message.lease)
                if lease is None:
                    reply(messages.Ended(message.lease, self._leases.why_ended(message.lease)))
                elif not lease.channel.deliver(payload, self._leases.unread):
                    log.warning("%s sends more messages than its transport reads; its lease is ended", lease)
                    lease.end(gone=True)
            case messages.GetDigests() | messages.GetPieces():
                if lease := self._running_lease(message.lease, reply):
                    lease.digests = True
                    self._digests.request(lease.generation, reply, message)
            case messages.CheckLease():
                if lease := self._running_lease(message.lease, reply):
                    if message.release:
                        reply(messages.Checked(self.model.generation))
                        lease.end(RELEASED)
                    elif not lease.ask(reply):
                        reply(lease.why)

    def _running_lease(self, id: bytes, reply: SendReply) -> Lease | None:
        """The lease with this id. None if it has ended; the fork is told why."""
        lease = self._leases.find(id)
        if isinstance(lease, Lease):
            return lease
        reply(lease)
        return None

    def _grant_lease(self, peer: bytes, request: messages.TakeLease, reply: SendReply) -> None:
        """Register a lease, and start the thread that replies to the fork; or refuse it."""
        generation, publication = self.model.at_one_moment()
        if refused := self._reason_to_refuse(peer, request, generation, publication):
            self._leases.refused += 1
            asked = request.transport, request.trace.hex()
            log.info("a fork over %.60r is refused (trace %s): %s", *asked, refused.reason)
            reply(refused)
            return
        id = os.urandom(16)
        channel = SeedChannel(self._listener, peer, id)
        expires = time.monotonic() + request.seconds
        lease = Lease(id, peer, request.transport, publication, generation, expires, channel, request.trace.hex())
        lease.digests = request.digests
        self._leases.add(lease)
        if request.digests:
            with suppress(RuntimeError):  # without a thread for them; whoever asks for them then is told
                self._digests.start()
        try:
            self._start_thread("tensorfork-lease", lambda: self._run_lease(lease, request, reply))
        except Exception as error:
            self._refuse(lease, error, reply)

    def _refuse(self, lease: Lease, error: Exception | None, reply: SendReply) -> None:
        """End a lease that has not begun, if it has not ended by itself, and tell the fork why."""
        if error is not None:
            lease.end(refusal(lease, error))
        self._leases.refused += 1
        self._leases.remove(lease)
        reply(lease.why)

    def _reason_to_refuse(
        self, peer: bytes, request: messages.TakeLease, generation: int, publication: Publication
    ) -> messages.Refused | None:
        offered = publication.offered.get(request.transport)
        if self.model.suspended:
            return ASLEEP
        if self._draining:
            return DRAINING
        if generation % 2:
            return messages.Refused(messages.CHANGED, self.model.why_changing())
        if request.publication not in (None, publication.number):
            return CHANGED
        if reason := self._limits.reason_against(len(self._leases), self._leases.of(peer)):
            return messages.Refused(messages.BUSY, reason)
        if request.transport == NoTransport.name:
            return None
        if offered is None:
            names = ", ".join(publication.offered) or "none"
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
                with ending.guarded():
                    work()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:  # `close` finds none that has not begun
            thread.start()
            self._threads.add(thread)
        return thread

    def _run_lease(self, lease: Lease, request: messages.TakeLease, reply: SendReply) -> None:
        """A lease from its export to its end."""
        transport = self._transports[request.transport]
        reachable = False
        try:
            export = self._export(lease, transport, request, reply)
            if export is None:
                return
            try:
                lease.share = self._rates.enter(lease, transport.rate_limited_by)
                leased = self._leased(lease, transport, export, request)
                serving = self._start_thread("tensorfork-serve", lambda: self._serve(export, lease))
            except Exception as error:
                reachable = not export.close(time.monotonic())
                self._refuse(lease, error, reply)
                return
            self._leases.granted += 1
            log.info("%s begins", lease)
            reply(*leased)
            while (asked := lease.checks.get()) is not None:
                self._check(lease, asked)
            if lease.why is not RELEASED:
                self._listener.send(lease.peer, messages.Ended(lease.id, lease.why))
            reachable = not export.close(time.monotonic() + CLOSE_TIMEOUT)
            lease.channel.end()
            serving.join(CLOSE_TIMEOUT)
        finally:
            lease.end()
            log.info("%s: %s%s", lease, lease.why.reason, "; it can still reach the memory" * reachable)
            self._rates.leave(lease)
            self._leases.remove(lease, reachable=reachable)

    def _tell_share(self, lease: Lease, share: float) -> None:
        self._listener.send(lease.peer, messages.ChangeShare(lease.id, share))

    def _leased(
        self, lease: Lease, transport: Transport, export: Export, request: messages.TakeLease
    ) -> tuple[messages.Leased, list[bytes]]:
        """The reply to a lease that was granted, and the pages behind it."""
        _, regions, places = lease.publication.cover(transport)
        values = lease.publication.values.packed() if request.values else None
        leased = messages.Leased(
            lease=lease.id,
            generation=lease.generation,
            regions=len(regions),
            places=len(places),
            version=tables.pack_version(self.version),
            rate_limit=self._rates.rate,
            share=lease.share,
        )
        if values is None:
            return leased, [export.offer, *regions, *places]
        leased = evolve(leased, values=len(values.pages), salt=values.salt, beyond=values.beyond)
        return leased, [export.offer, *regions, *places, *values.pages]

    def _export(
        self, lease: Lease, transport: Transport, request: messages.TakeLease, reply: SendReply
    ) -> Export | None:
        """Look at the tensors, and export their memory. None if that cannot be; the fork is told why."""
        try:
            if self.model.suspended:  # since it was granted
                lease.end(ASLEEP)
            if not lease.ended.is_set():
                lease.publication.places.check()
                regions = lease.publication.cover(transport).regions
                return transport.export(regions, self._site, request.facts, lease.expires)
            self._refuse(lease, None, reply)
        except Exception as error:
            self._refuse(lease, error, reply)
        return None

    def _check(self, lease: Lease, reply: SendReply) -> None:
        """Look at the tensors for a fork, and reply with the generation."""
        try:
            if self.model.generation == lease.generation:
                lease.publication.places.check_memory()
            reply(messages.Checked(self.model.generation))
        except Exception as error:
            reply(refusal(lease, error))

    def _serve(self, export: Export, lease: Lease) -> None:
        try:
            export.serve(lease.channel)
        except PeerUnreachable as error:
            if lease.why is not RELEASED:
                log.info("%s went away, or a transfer ended: %s", lease, error)
            lease.end(self._why_failed(lease), gone=True)
        except Exception:
            log.exception("serving %s failed; its lease is ended", lease)
            lease.end(self._why_failed(lease), gone=True)

    def _why_failed(self, lease: Lease) -> messages.Refused:
        """What a fork is told, if it asks, whose transfer failed at the seed: its memory may not be there any more."""
        try:
            if not lease.ended.is_set():
                lease.publication.places.check_memory()
        except SeedMoved as moved:
            return refusal(lease, moved)
        return ENDED

    # The ends of leases.

    def _on_replaced(self, publication: Publication) -> None:
        self._leases.end_all(CHANGED, lambda lease: lease.publication.number != publication.number)
        self._digests.forget()

    def _check_leases(self) -> float | None:
        """End the leases that have expired. Returns when to check again."""
        leases, now = self._leases.running(), time.monotonic()
        for lease in leases:
            if lease.expires <= now:
                self._leases.expired += 1
                lease.end()
        return min((lease.expires for lease in leases if lease.expires > now), default=None)

    def _has_lease(self, peer: bytes) -> bool:
        return self._leases.of(peer) > 0

    def _on_gone(self, peer: bytes) -> None:
        for lease in self._leases.peer_gone(peer):
            if lease.why is not RELEASED:  # else its fork has just given it back
                log.info("%s has gone away; its lease is ended", lease)
