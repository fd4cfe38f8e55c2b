"""The seed's record of its leases: those that run, how others ended, and who may still reach the memory."""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field, frozen

from tensorfork.seed.publication import Publication
from tensorfork.wire import messages
from tensorfork.wire.listener import SeedChannel, SendReply

MAX_ENDED = 1024
"""Leases that have ended of which the reason is remembered."""

ENDED = messages.Refused(messages.UNKNOWN, "the lease has ended; it lasts as long as the fork's timeout")
RELEASED = messages.Refused(messages.UNKNOWN, "the lease has ended: it was given back")


@define(eq=False)
class Lease:
    """One fork's lease, at the seed.

    Attributes:
        id: what the fork's messages about the lease carry.
        peer: the fork's connection, as the listener names it.
        transport: the name of the transport.
        publication: what is leased.
        generation: the seed's generation when it was granted.
        expires: when it ends, by `time.monotonic()`.
        channel: the seed's end of its channel.
        checks: replies to requests to look at the tensors, for the lease's thread; None, the last, ends it.
        ended: set when the lease is to end.
        connected: whether its fork's connection is there.
        trace: the fork's trace id, as hexadecimal digits; empty if it has none.
        digests: whether its fork has asked for digests, or said that it will.
        why: what the fork is told about the end.
        share: bytes a second that its fork was told to read at most when it began; None where the seed holds its rate
            limit itself, or has none.
    """

    id: bytes
    peer: bytes
    transport: str
    publication: Publication
    generation: int
    expires: float
    channel: SeedChannel
    trace: str = ""
    checks: "queue.SimpleQueue[SendReply | None]" = field(factory=queue.SimpleQueue)
    ended: threading.Event = field(factory=threading.Event)
    connected: bool = True
    digests: bool = False
    why: messages.Refused = ENDED
    share: float | None = None
    _lock: threading.Lock = field(factory=threading.Lock)

    def ask(self, reply: SendReply) -> bool:
        """Have the lease's thread look at the tensors, and reply. False if it has ended."""
        with self._lock:
            if not self.ended.is_set():
                self.checks.put(reply)
            return not self.ended.is_set()

    def end(self, why: messages.Refused = ENDED, *, gone: bool = False) -> None:
        """End the lease; its threads do the rest. A second call does nothing more than the first.

        `gone` says that the fork is not there any more: then nothing waits for it.
        """
        with self._lock:
            if not self.ended.is_set():
                self.why = why
                self.ended.set()
                self.checks.put(None)
        if gone:
            self.channel.end()

    def __str__(self) -> str:
        what = f"a fork over {self.transport}" if self.transport else "a process that asks for digests"
        trace = f", trace {self.trace}" if self.trace else ""
        return f"{what} (lease {self.id.hex()[:8]}{trace})"


class LeaseTable:
    """The leases of one seed. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._leases: dict[bytes, Lease] = {}
        self._ended: OrderedDict[bytes, messages.Refused] = OrderedDict()
        self._reachable: dict[bytes, tuple[bytes, str]] = {}
        """By the id of a lease that has ended, the connection and the description of a fork that may still read."""
        self.granted = self.refused = self.expired = 0

    def __len__(self) -> int:
        return len(self._leases)

    def of(self, peer: bytes) -> int:
        """The number of leases that this connection has."""
        with self._lock:
            return sum(lease.peer == peer for lease in self._leases.values())

    def add(self, lease: Lease) -> None:
        """Record a lease that was granted."""
        with self._lock:
            self._leases[lease.id] = lease

    def remove(self, lease: Lease, *, reachable: bool = False) -> None:
        """Forget a lease whose threads have ended. `reachable` says that its fork may still read the memory."""
        with self._lock:
            self._leases.pop(lease.id, None)
            self._ended[lease.id] = lease.why
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)
            if reachable and lease.connected:
                self._reachable[lease.id] = lease.peer, str(lease)
            self._changed.notify_all()

    def find(self, id: bytes) -> Lease | messages.Refused:
        """The lease with this id; if it has ended, why."""
        lease = self._leases.get(id)
        if lease is not None:
            return lease.why if lease.ended.is_set() else lease
        return self.why_ended(id)

    def why_ended(self, id: bytes) -> messages.Refused:
        """Why a lease that is gone has ended, as far as that is remembered."""
        return self._ended.get(id, ENDED)

    def get(self, id: bytes) -> Lease | None:
        """The lease with this id, also one that is ending: its fork's last message says that it does not read now."""
        return self._leases.get(id)

    def running(self) -> list[Lease]:
        """Those that have not been told to end."""
        with self._lock:
            return [lease for lease in self._leases.values() if not lease.ended.is_set()]

    def unread(self) -> int:
        """Bytes of messages of forks that no transport has read yet, on the channels of all leases."""
        with self._lock:
            return sum(lease.channel.unread for lease in self._leases.values())

    def want_digests(self) -> bool:
        """Whether a lease that runs waits for digests, or will."""
        return any(lease.digests for lease in self.running())

    def end_all(self, why: messages.Refused, which: Callable[[Lease], bool] = lambda _: True) -> None:
        """End all leases, or some, and say why."""
        for lease in self.running():
            if which(lease):
                lease.end(why)

    def peer_gone(self, peer: bytes) -> list[Lease]:
        """A fork's connection is gone: end its leases, and return them. It cannot read any more."""
        with self._lock:
            gone = [lease for lease in self._leases.values() if lease.peer == peer and lease.connected]
            for lease in gone:
                lease.connected = False
            self._reachable = {id: one for id, one in self._reachable.items() if one[0] != peer}
            self._changed.notify_all()
        for lease in gone:
            lease.end(gone=True)
        return gone

    def users(self) -> list[str]:
        """Who can read the memory, in words."""
        with self._lock:
            return [*map(str, self._leases.values()), *(text for _, text in self._reachable.values())]

    def wait_until_unused(self, deadline: float, *, readers: bool) -> bool:
        """Wait until no lease is left, and, with `readers`, nobody may still read. Whether that is so in time."""

        def unused() -> bool:
            return not self._leases and not (readers and self._reachable)

        with self._lock:
            return self._changed.wait_for(unused, max(0.0, deadline - time.monotonic()))


@frozen
class SeedStats:
    """What a seed has done: leases granted, refused, running now and expired, and times its digests were computed;
    and the bytes of its tensors that it has sent. What forks read by themselves it does not see.
    """

    granted: int
    refused: int
    running: int
    expired: int
    digested: int
    sent: int = 0
