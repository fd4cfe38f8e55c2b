"""The seed's side of a lease: it answers requests with the bytes of its regions."""

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from tensorfork.errors import PeerUnreachable
from tensorfork.interpreter.limits import require_descriptors, require_threads
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.memory.staging import HostAccess
from tensorfork.regions import Region
from tensorfork.sockets.port import TOKEN_BYTES, Peer
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zero_copy import Releases
from tensorfork.transports.base import Channel, Export, Site
from tensorfork.transports.rate_limit import limited_piece
from tensorfork.transports.zeromq.buffers import AnswerBuffers
from tensorfork.transports.zeromq.protocol import (
    ANSWER_HEADER,
    GREETING,
    LEAST_WINDOW,
    MAX_CONNECTIONS,
    MAX_REQUEST,
    MOVED,
    OFFER,
    OK,
    OUT_OF_BOUNDS,
    RANGE,
    REQUEST_HEADER,
    WINDOW,
)

log = logging.getLogger("tensorfork")

MAX_WAITING = WINDOW + MAX_CONNECTIONS * (LEAST_WINDOW + 1)
"""Requests that wait for their answers, at most: all that a fork's connections send."""
SEND_BUFFER = 384 << 10
"""Bytes of the kernel's send buffer where both sides are on one host: by itself it grows to megabytes, out of the
processor's cache, and costs a third of the speed. Between hosts the kernel's own choice is better."""

GRACE = 0.2
"""Seconds in which a fork that is done lets go of the last answers by itself."""


class ZeroMQExport(Export):
    """One lease, on the seed's port. The regions' memory is used until `close` returns True."""

    def __init__(self, regions: Sequence[Region], site: Site, *, same_host: bool) -> None:
        assert site.port is not None
        require_descriptors()  # for the fork's connections
        require_threads(1)  # to serve on
        self._port, self._stall, self._same_host = site.port, site.stall, same_host
        self._share = site.limiter.share()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._closing, self._serve_lock = threading.Event(), threading.Lock()
        self._requests: deque[tuple[Peer, bytes]] = deque()
        self._peers: dict[bytes, Peer] = {}
        self._said_moved = self._flooded = False
        with ExitStack() as stack:
            self._waker = Waker()
            stack.callback(self._waker.close)
            self._buffers = AnswerBuffers(regions)
            stack.callback(self._buffers.close)
            self._memory = HostAccess(regions)
            stack.callback(self._memory.close)
            self._releases = Releases()
            stack.callback(self._releases.close)
            frame = limited_piece(self._buffers.frame, site.limiter.rate)
            self.offer = OFFER.pack(self._token, frame, self._buffers.alone)
            self._port.attach(self._token, self._receive)
            self._resources = stack.pop_all()

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        with self._serve_lock:
            while not self._closing.is_set():
                if self._flooded:
                    raise PeerUnreachable("the fork sends more requests than it may have in flight")
                try:
                    peer, request = self._requests.popleft()
                except IndexError:
                    self._wait(math.inf)
                else:
                    self._answer(peer, request)

    def close(self, deadline: float) -> bool:
        """See `Export.close`. What is on its way to the fork is dropped."""
        if not self._closing.is_set():
            self._closing.set()
            self._share.close()
            self._port.detach(self._token)
            self._waker.wake()
            if not self._serve_lock.acquire(timeout=max(0.1, deadline - time.monotonic())):
                return False
            self._serve_lock.release()
            self._take_back(deadline)
        return not self._buffers.lent or not self._buffers.alone

    def _take_back(self, deadline: float) -> None:
        """Wait until libzmq has released what it was lent, and end connections that keep it; release everything then.

        What does not come back is never used again.
        """
        now = time.monotonic()
        self._collect(min(deadline, now + GRACE))
        if self._buffers.lent:
            for peer in self._peers.values():
                self._port.end(peer.id)
            self._collect(max(deadline, now + 2 * GRACE))
        if self._buffers.lent:
            log.warning("%s answers of a lease that has ended are still held by ZeroMQ", self._buffers.lent)
        else:
            self._resources.close()

    def _collect(self, until: float) -> None:
        """Take back buffers until all are here, or until then."""
        while self._buffers.lent and time.monotonic() < until:
            self._give_back(self._releases.wait(None, until))

    def _receive(self, peer: Peer, request: bytes) -> None:
        """Take a request, on the port's thread."""
        if peer.id not in self._peers:
            if len(self._peers) == MAX_CONNECTIONS:
                self._peers = {id: one for id, one in self._peers.items() if not one.is_closed()}
            self._flooded |= len(self._peers) == MAX_CONNECTIONS
            if not self._flooded:
                self._peers[peer.id] = peer
                if self._same_host:
                    self._port.set_send_buffer(peer, SEND_BUFFER)
        self._flooded |= len(self._requests) >= MAX_WAITING
        if not self._flooded:
            self._requests.append((peer, request))
        self._waker.wake()

    def _answer(self, peer: Peer, request: bytes) -> None:
        if not REQUEST_HEADER.size <= len(request) <= MAX_REQUEST:
            return
        if (len(request) - REQUEST_HEADER.size) % RANGE.size:
            return
        (number,) = REQUEST_HEADER.unpack_from(request)
        ranges = list(RANGE.iter_unpack(memoryview(request)[REQUEST_HEADER.size :]))
        taken = self._next_buffer()
        if taken is None:
            return
        buffer, address = taken
        status, span = (OK, None) if number == GREETING and not ranges else self._read(ranges, address)
        if span is not None and not self._wait_for_limit(span[1]):
            self._buffers.give_back(buffer)
            return
        self._port.lend(peer, ANSWER_HEADER.pack(number, status), span, self._releases, buffer)

    def _read(self, ranges: Sequence[tuple[int, int, int]], into: int) -> tuple[int, tuple[int, int] | None]:
        """The status of an answer, and the (address, bytes) of what is sent with it: `into`, where the ranges have been
        copied to, or the memory itself where it may be lent.
        """
        if not ranges or not self._memory.may_read(ranges, self._buffers.frame):
            return OUT_OF_BOUNDS, None
        if len(ranges) == 1 and self._memory.all_stable(ranges):
            return OK, self._memory.spans(ranges)[0]
        try:
            self._memory.read(ranges, into)
        except UnreadableMemory as error:
            if not self._said_moved:
                log.warning("a fork requested what was published, and cannot be read any more: %s", error)
            self._said_moved = True
            return MOVED, None
        return OK, (into, sum(nbytes for _, _, nbytes in ranges))

    def _wait_for_limit(self, nbytes: int) -> bool:
        """Wait until the seed's rate limit lets so many bytes through. False when the lease ends first."""
        while seconds := self._share.try_spend(nbytes):
            if self._closing.wait(seconds):
                return False
        return True

    def _next_buffer(self) -> tuple[int, int] | None:
        """The number and the address of a buffer, once libzmq has released one; None when the lease ends first.

        Raises `PeerUnreachable` where the fork lets none go for as long as a stall is.
        """
        stalled_at = time.monotonic() + self._stall
        while not self._closing.is_set():
            taken = self._buffers.take()
            if taken is not None:
                return taken
            if time.monotonic() >= stalled_at:
                raise PeerUnreachable(f"the fork has read nothing of what was sent to it for {self._stall:g} s")
            self._wait(stalled_at)
        return None

    def _wait(self, until: float) -> None:
        """Wait until a buffer or a request comes, the lease ends, or until then."""
        self._give_back(self._releases.wait(self._waker.fileno(), until))
        self._waker.clear()

    def _give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._buffers.give_back(number)
