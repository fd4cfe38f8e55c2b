"""The seed's side: what it publishes, its leases, its generation, and the thread that answers.

Nothing here ever waits for the engine, or makes it wait: requests are answered from the listener's thread out of cached
bytes, each lease has threads of its own, digests are computed on another (`generation`).
"""

import atexit
import logging
import os
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from attrs import define, field, frozen

from tensorfork import cuda, digest, wire
from tensorfork.bootstrap import Answer, Listener, SeedChannel
from tensorfork.collector import put_off_collections
from tensorfork.errors import PeerUnreachable, TensorForkError, TransportUnavailable
from tensorfork.generation import Clock, DigestsOnce
from tensorfork.layout import Memory, ModelLayout
from tensorfork.sockets import Address
from tensorfork.transports.base import Export, Region, RemoteRegion, Site, Transport
from tensorfork.version import __version__

log = logging.getLogger("tensorfork")

MAX_LEASES = 64
BEAT = 2.0
"""Seconds between two looks at whether the forks that hold leases are still there."""
CLOSING = 5.0
"""Seconds that `close` waits for its threads."""


@frozen
class SeedStats:
    """What a seed has done: leases granted, refused, running now and expired, and times its digests were computed."""

    granted: int
    refused: int
    running: int
    expired: int
    digested: int


class Seed:
    """A published model. Made by `tensorfork.publish`; keeps what it published alive until `close`.

    Attributes:
        address: where forks find it, such as ``tcp://10.0.0.7:4180``.
        layout: what it published.
        identity: which model it is, where that was said.
        rank: which part of it, where that was said.
    """

    def __init__(
        self,
        layout: ModelLayout,
        tensors: Mapping[str, torch.Tensor],
        memory: Memory,
        transports: Mapping[str, Transport],
        bind: str,
        advertise: str | None,
    ) -> None:
        self._closed = True  # until there is something to close
        self._service = _Service(layout, tensors, memory, transports, bind, advertise)
        self._closed = False
        _open.add(self)
        _close_at_exit()
        self.address = str(self._service.address)
        self.layout = layout
        self.identity, self.rank = layout.identity, layout.rank

    @property
    def generation(self) -> int:
        """Changes when the tensors are changed in place; odd while they are being changed."""
        return self._service.clock.generation

    def updating(self) -> AbstractContextManager[None]:
        """A context manager round an in-place change of the tensors, so that no fork takes a mixture of old and new.

        Leaving it waits for the current stream of each of the model's GPUs before the generation is even again. Should
        the change raise, the generation stays odd, and forks are refused, until a later change succeeds. Changes from
        several threads may overlap.
        """
        return self._service.clock.updating()

    def stats(self) -> SeedStats:
        """What it has done so far."""
        return self._service.stats()

    def close(self, timeout: float = CLOSING) -> None:
        """Stop answering and end all leases, waiting at most `timeout` seconds. Forks under way fail; a second time
        does nothing.
        """
        if not self._closed:
            self._closed = True
            _open.discard(self)
            self._service.close(time.monotonic() + timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"generation {self.generation}"
        return f"<Seed {self.address} {len(self.layout.tensors):,} tensors, {state}>"


_open: "weakref.WeakSet[Seed]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_open.clear)  # they are the parent's


@cache
def _close_at_exit() -> None:
    """Once, and behind what its transports have registered for the end, which comes after this, then. A thread that is
    inside of torch when Python has ended aborts the process.
    """
    atexit.register(_close_all)


def _close_all() -> None:
    for seed in list(_open):
        seed.close()


@define(eq=False)
class _Lease:
    """One fork's lease. `ended` is what its threads wait for."""

    id: bytes
    peer: bytes
    generation: int
    expires: float
    channel: SeedChannel
    ended: threading.Event = field(factory=threading.Event)

    def end(self) -> None:
        self.ended.set()
        self.channel.end()


class _Service:
    """What answers forks. `Seed` is its handle: a service in use does not keep its `Seed` from being collected."""

    def __init__(
        self,
        layout: ModelLayout,
        tensors: Mapping[str, torch.Tensor],
        memory: Memory,
        transports: Mapping[str, Transport],
        bind: str,
        advertise: str | None,
    ) -> None:
        self._layout, self._tensors, self._memory, self._transports = layout, tensors, memory, transports
        self._regions = memory.regions(layout)
        self.clock = Clock(frozenset(torch.device(s.device) for s in layout.storages if s.device.startswith("cuda")))
        self._digests = DigestsOnce(tensors, self.clock)
        self._covered: dict[str, tuple[Sequence[Region], list[bytes]]] = {}
        self._leases: dict[bytes, _Lease] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._granted = self._refused = self._expired = 0
        self._pages = wire.pack_layout(layout)
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

    def _make_welcome(self) -> wire.Welcome:
        offered = {}
        for name, transport in self._transports.items():
            try:
                offered[name] = wire.Offered(dict(transport.facts(self._regions)), None)
            except TransportUnavailable as error:
                offered[name] = wire.Offered({}, str(error))
        identity, rank = self._layout.identity, self._layout.rank
        return wire.Welcome(
            __version__,
            secrets.token_bytes(16),
            len(self._layout.tensors),
            len(self._layout.storages),
            self._layout.nbytes,
            digest.NAME,
            offered,
            None if identity is None else identity.as_dict(),
            None if rank is None else dict(rank.as_dict()),
        )

    def _handle(self, peer: bytes, message: Any, said: bytes, answer: Answer) -> None:
        match message:
            case wire.Hello():
                answer(self._welcome)
            case wire.GetLayout():
                answer(*self._pages)
            case wire.TakeLease():
                self._take(peer, message, answer)
            case wire.Say():
                lease = self._leases.get(message.lease)
                if lease is not None and not lease.channel.hear(said):
                    log.warning("a fork says more than its transport reads; its lease is ended")
                    lease.end()
            case wire.GetDigests():
                lease = self._find(message.lease, answer)
                if lease is not None:
                    self._digests.ask(lease.generation, answer)
            case wire.CheckLease():
                lease = self._find(message.lease, answer)
                if lease is not None:
                    answer(wire.Checked(self.clock.generation))
                    if message.release:
                        lease.end()

    def _find(self, id: bytes, answer: Answer) -> _Lease | None:
        lease = self._leases.get(id)
        if lease is None or lease.ended.is_set():
            answer(wire.Refused(wire.UNKNOWN, "the lease has ended; it lasts as long as the fork's timeout"))
            return None
        return lease

    def _take(self, peer: bytes, request: wire.TakeLease, answer: Answer) -> None:
        generation = self.clock.generation
        offered = self._welcome.transports.get(request.transport)
        refused = None
        if generation % 2:
            refused = wire.Refused(wire.CHANGED, "the seed's weights are being changed; try again")
        elif len(self._leases) >= MAX_LEASES:
            refused = wire.Refused(wire.BUSY, f"the seed has {MAX_LEASES} forks already; try again")
        elif offered is None:
            names = ", ".join(self._transports) or "none"
            refused = wire.Refused(wire.UNAVAILABLE, f"the seed does not offer {request.transport!r}; it has: {names}")
        elif offered.why_not is not None:
            refused = wire.Refused(wire.UNAVAILABLE, offered.why_not)
        if refused is not None:
            self._refused += 1
            answer(refused)
            return
        id = secrets.token_bytes(16)
        lease = _Lease(id, peer, generation, time.monotonic() + request.seconds, SeedChannel(self._listener, peer, id))
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

    def _hold(self, lease: _Lease, request: wire.TakeLease, answer: Answer) -> None:
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
            answer(wire.Refused(wire.UNAVAILABLE, f"the seed cannot export over {transport.name}: {error}"))
            return
        self._granted += 1
        serving = self._start(self._serve, export, lease)
        answer(wire.Leased(lease.id, lease.generation, export.offer, len(pages)), pages)
        lease.ended.wait()
        if not export.close(time.monotonic() + CLOSING):
            log.info("a lease over %s has ended; its reader can still reach the memory", transport.name)
        serving.join(CLOSING)
        self._end(lease)

    def _cover(self, transport: Transport) -> tuple[Sequence[Region], list[bytes]]:
        """The regions that a transport would rather touch, and what forks are told of them: the same for each lease."""
        if transport.name not in self._covered:
            with put_off_collections():  # one that looks at everything would hold the engine up
                regions, places = transport.cover(self._regions)
                remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
                where = {region.id: place for region, place in zip(self._regions, places, strict=True)}
                self._covered[transport.name] = regions, wire.pack_places(remote, where)
                del remote, places, where
        return self._covered[transport.name]

    def _serve(self, export: Export, lease: _Lease) -> None:
        try:
            export.serve(lease.channel)
        except PeerUnreachable as error:
            log.info("a fork went away: %s", error)
            lease.end()
        except Exception:
            log.exception("serving a fork failed; its lease is ended")
            lease.end()

    def _end(self, lease: _Lease) -> None:
        lease.end()
        with self._lock:
            self._leases.pop(lease.id, None)

    def _tick(self) -> float | None:
        """End the leases whose time is over, and see whether the others' forks are there; when to look again."""
        with self._lock:
            leases = [lease for lease in self._leases.values() if not lease.ended.is_set()]
        now = time.monotonic()
        if leases and now >= self._next_beat:
            self._next_beat = now + BEAT
            for lease in leases:
                self._listener.say(lease.peer, wire.Checked(self.clock.generation))  # an answer to nothing
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
