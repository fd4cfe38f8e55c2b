"""The seed's side: what it publishes, its leases, its generation, and the thread that answers.

Nothing here ever waits for the engine, or makes it wait: requests are answered from the listener's thread out of cached
bytes, each lease has threads of its own, digests are computed on another (`generation`).
"""

import logging
import secrets
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
from tensorfork.seed.leases import Lease, SeedStats
from tensorfork.sockets.address import Address
from tensorfork.transports.base import Export, Site, Transport
from tensorfork.version import __version__
from tensorfork.wire import messages, tables
from tensorfork.wire.listener import Listener, SeedChannel, SendReply

log = logging.getLogger("tensorfork")

MAX_LEASES = 64

LIVENESS_INTERVAL = 2.0
"""Seconds between two looks at whether the forks that hold leases are still there."""

CLOSE_TIMEOUT = 5.0
"""Seconds that `close` waits for its threads."""


class SeedService:
    """What answers forks. `Seed` is its handle: a service in use does not keep its `Seed` from being collected."""

    def __init__(
        self,
        layout: ModelLayout,
        tensors: Mapping[str, torch.Tensor],
        memory: ModelMemory,
        transports: Mapping[str, Transport],
        bind: str,
        advertise: str | None,
    ) -> None:
        self._layout, self._tensors, self._memory, self._transports = layout, tensors, memory, transports
        self._regions = memory.regions(layout)
        self.clock = SeqLock(frozenset(torch.device(s.device) for s in layout.storages if s.device.startswith("cuda")))
        self._digests = DigestCache(tensors, self.clock)
        self._covered: dict[str, tuple[Sequence[Region], list[bytes]]] = {}
        self._leases: dict[bytes, Lease] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._granted = self._refused = self._expired = 0
        self._pages = tables.pack_layout(layout)
        self._welcome = self._make_welcome()
        at = Address.parse(bind)
        found = None if advertise is None else _advertised(advertise)
        if at.is_wildcard and found is None:
            raise ValueError(f"bind={bind!r} is every interface; say with advertise= by which address forks reach it")
        self._next_beat = 0.0
        self._listener = Listener(at, self._handle, self._gone)
        port = self._listener.address.port
        host = self._listener.address.host if found is None else found[0]
        self.address = Address(host, port if found is None or found[1] is None else found[1])
        self._site = Site(at.host, host)
        self._listener.start(self._tick)

    def stats(self) -> SeedStats:
        with self._lock:
            return SeedStats(self._granted, self._refused, len(self._leases), self._expired, self._digests.computed)

    def close(self, deadline: float) -> None:
        self._digests.close()
        self._listener.close(deadline)  # first, so that no lease is taken behind our back
        with self._lock:
            leases, threads = list(self._leases.values()), list(self._threads)
        for lease in leases:
            lease.end()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for transport in self._transports.values():
            transport.forget(self._regions)

    def _make_welcome(self) -> messages.Welcome:
        offered = {}
        for name, transport in self._transports.items():
            try:
                offered[name] = messages.Offered(dict(transport.facts(self._regions)), None)
            except TransportUnavailable as error:
                offered[name] = messages.Offered({}, str(error))
        identity, rank = self._layout.identity, self._layout.rank
        return messages.Welcome(
            __version__,
            secrets.token_bytes(16),
            len(self._layout.tensors),
            len(self._layout.storages),
            self._layout.nbytes,
            definition.NAME,
            offered,
            None if identity is None else identity.as_dict(),
            None if rank is None else dict(rank.as_dict()),
        )

    def _handle(self, peer: bytes, message: Any, said: bytes, answer: SendReply) -> None:
        match message:
            case messages.Hello():
                answer(self._welcome)
            case messages.GetLayout():
                answer(*self._pages)
            case messages.TakeLease():
                self._take(peer, message, answer)
            case messages.Say():
                lease = self._leases.get(message.lease)
                if lease is not None and not lease.channel.hear(said):
                    log.warning("a fork says more than its transport reads; its lease is ended")
                    lease.end()
            case messages.GetDigests():
                lease = self._find(message.lease, answer)
                if lease is not None:
                    self._digests.ask(lease.generation, answer)
            case messages.CheckLease():
                lease = self._find(message.lease, answer)
                if lease is not None:
                    answer(messages.Checked(self.clock.generation))
                    if message.release:
                        lease.end()

    def _find(self, id: bytes, answer: SendReply) -> Lease | None:
        lease = self._leases.get(id)
        if lease is None or lease.ended.is_set():
            answer(messages.Refused(messages.UNKNOWN, "the lease has ended; it lasts as long as the fork's timeout"))
            return None
        return lease

    def _take(self, peer: bytes, request: messages.TakeLease, answer: SendReply) -> None:
        generation = self.clock.generation
        offered = self._welcome.transports.get(request.transport)
        refused = None
        if generation % 2:
            refused = messages.Refused(messages.CHANGED, "the seed's weights are being changed; try again")
        elif len(self._leases) >= MAX_LEASES:
            refused = messages.Refused(messages.BUSY, f"the seed has {MAX_LEASES} forks already; try again")
        elif offered is None:
            names = ", ".join(self._transports) or "none"
            refused = messages.Refused(
                messages.UNAVAILABLE, f"the seed does not offer {request.transport!r}; it has: {names}"
            )
        elif offered.why_not is not None:
            refused = messages.Refused(messages.UNAVAILABLE, offered.why_not)
        if refused is not None:
            self._refused += 1
            answer(refused)
            return
        id = secrets.token_bytes(16)
        lease = Lease(id, peer, generation, time.monotonic() + request.seconds, SeedChannel(self._listener, peer, id))
        if request.digests:
            self._digests.begin()
        with self._lock:
            self._leases[id] = lease
        self._start(self._hold, lease, request, answer)

    def _start(self, work: Callable[..., None], *args: Any) -> threading.Thread:
        def run() -> None:
            cuda.relax_capture()
            try:
                work(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name=f"tensorfork-{work.__name__.strip('_')}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
        return thread

    def _hold(self, lease: Lease, request: messages.TakeLease, answer: SendReply) -> None:
        """A lease's whole life, on a thread of its own."""
        transport = self._transports[request.transport]
        try:
            regions, pages = self._cover(transport)
            export = transport.export(regions, self._site, request.facts, lease.expires)
        except Exception as error:
            if not isinstance(error, TensorForkError):
                log.exception("the transport %s failed to export", transport.name)
            self._refused += 1
            self._end(lease)
            answer(messages.Refused(messages.UNAVAILABLE, f"the seed cannot export over {transport.name}: {error}"))
            return
        self._granted += 1
        serving = self._start(self._serve, export, lease)
        answer(messages.Leased(lease.id, lease.generation, export.offer, len(pages)), pages)
        lease.ended.wait()
        if not export.close(time.monotonic() + CLOSE_TIMEOUT):
            log.info("a lease over %s has ended; its reader can still reach the memory", transport.name)
        serving.join(CLOSE_TIMEOUT)
        self._end(lease)

    def _cover(self, transport: Transport) -> tuple[Sequence[Region], list[bytes]]:
        """The regions that a transport would rather touch, and what forks are told of them: the same for each lease."""
        if transport.name not in self._covered:
            with gc_paused():  # one that looks at everything would hold the engine up
                regions, places = transport.cover(self._regions)
                remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
                where = {region.id: place for region, place in zip(self._regions, places, strict=True)}
                self._covered[transport.name] = regions, tables.pack_places(remote, where)
                del remote, places, where
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

    def _end(self, lease: Lease) -> None:
        lease.end()
        with self._lock:
            self._leases.pop(lease.id, None)

    def _tick(self) -> float | None:
        """End the leases whose time is over, and see whether the others' forks are there; when to look again."""
        with self._lock:
            leases = [lease for lease in self._leases.values() if not lease.ended.is_set()]
        now = time.monotonic()
        if leases and now >= self._next_beat:
            self._next_beat = now + LIVENESS_INTERVAL
            for lease in leases:
                self._listener.say(lease.peer, messages.Checked(self.clock.generation))  # an answer to nothing
        for lease in leases:
            if lease.expires <= now:
                self._expired += 1
                lease.end()
        return min((self._next_beat, *(lease.expires for lease in leases if lease.expires > now))) if leases else None

    def _gone(self, peer: bytes) -> None:
        with self._lock:
            leases = [lease for lease in self._leases.values() if lease.peer == peer]
        for lease in leases:
            log.info("a fork has gone away; its lease is ended")
            lease.end()


def _advertised(text: str) -> tuple[str, int | None]:
    """A host, or a host and a port."""
    bare = text.removeprefix("tcp://")
    for written in (text, f"{bare}:*", f"[{bare}]:*"):
        try:
            address = Address.parse(written)
        except ValueError:
            continue
        if not address.is_wildcard:
            return address.host, address.port
    raise ValueError(f"advertise={text!r} is not an address by which forks can come; give a host, or host:port")
