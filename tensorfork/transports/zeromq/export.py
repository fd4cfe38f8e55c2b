"""The seed's side of a lease: it answers requests with the bytes of its regions."""

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import zmq

from tensorfork.errors import TransportUnavailable
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.memory.staging import HostAccess
from tensorfork.regions import Region
from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zero_copy import Releases, ZeroCopySender
from tensorfork.sockets.zeromq import bind, new_context, new_socket, recv_arrived
from tensorfork.transports.base import Channel, Export, Site
from tensorfork.transports.rate_limit import limited_piece
from tensorfork.transports.zeromq.buffers import PINNED_BUFFERS, AnswerBuffers
from tensorfork.transports.zeromq.protocol import (
    ANSWER_HEADER,
    FRAME,
    GREETING,
    MAX_REQUEST,
    MOVED,
    NOT_THIS_SEED,
    OFFER,
    OK,
    OUT_OF_BOUNDS,
    RANGE,
    REQUEST_HEADER,
    WINDOW,
)

log = logging.getLogger("tensorfork")

_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

MAX_STRANGERS = 256
"""Connections of a lease that are told that their token is not its own; later ones are told nothing. What one of them
does not read is kept, so that it must be bounded."""
SEND_BUFFER = 384 << 10
"""Bytes of the kernel's send buffer where both sides are on one host: by itself it grows to megabytes, out of the
processor's cache, and costs a third of the speed. Between hosts the kernel's own choice is better."""

GUARD_SECONDS = 0.1
"""Seconds between two looks at the connections while the rate limit is waited for."""
UNFINISHED = 256 << 10
"""Bytes of requests that one connection may have sent and that were not received yet. A fork has a window of them,
25 KB, in flight."""


class ZeroMQExport(Export):
    """One lease: a ROUTER socket on a port of its own. The regions' memory is used until `close` returns True."""

    def __init__(self, regions: Sequence[Region], site: Site, ports: range | None, *, same_host: bool) -> None:
        self._token = secrets.token_bytes(16)
        self._closing, self._serve_lock = threading.Event(), threading.Lock()
        self._said_moved = False
        self._strangers: set[bytes] = set()
        self._share = site.limiter.share()
        with ExitStack() as stack:  # what libzmq reads or writes ends after its context
            self._waker = Waker()
            stack.callback(self._waker.close)
            self._memory = HostAccess(regions, PINNED_BUFFERS, FRAME)
            stack.callback(self._memory.close)
            self._buffers = AnswerBuffers(regions, self._memory)
            stack.callback(self._buffers.close)
            releases = Releases()
            stack.callback(releases.close)
            context = new_context(2)
            stack.callback(context.destroy, linger=0)
            self._socket = new_socket(context, zmq.ROUTER, max_message=MAX_REQUEST, queue=4 * WINDOW)
            self._socket.sndhwm = 0  # the buffers bound what waits to be sent
            self._socket.router_mandatory = True
            if same_host:
                self._socket.sndbuf = SEND_BUFFER
            self._guard = ConnectionGuard(self._socket.get_monitor_socket(GUARDED_EVENTS), unfinished=UNFINISHED)
            stack.callback(self._guard.close)
            stack.callback(self._socket.disable_monitor)
            self._sender = ZeroCopySender(self._socket, releases)
            port = self._bind(site.bind, ports)
            self._guard.watch(port)
            frame = limited_piece(self._buffers.frame, site.limiter.rate)
            self.offer = OFFER.pack(self._token, port, frame, self._buffers.alone)
            self._resources = stack.pop_all()

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        with self._serve_lock:
            if self._closing.is_set():
                return
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._waker.fileno(), zmq.POLLIN)
            self._guard.register(poller)
            while not self._closing.is_set():
                if self._socket in dict(poller.poll()):
                    self._answer_requests()
                self._guard.look(time.monotonic())

    def close(self, deadline: float) -> bool:
        """See `Export.close`."""
        if self._closing.is_set():
            return True
        self._closing.set()
        self._share.close()
        self._waker.wake()
        stopped = self._serve_lock.acquire(timeout=max(0.1, deadline - time.monotonic()))
        if stopped:
            self._resources.close()
            self._serve_lock.release()
        return stopped

    def _bind(self, host: str, ports: range | None) -> int:
        """Bind to the first free port of the range, or to any; returns the port."""
        for port in [None] if ports is None else ports:
            try:
                bound = bind(self._socket, Address(host, port))
            except zmq.ZMQError as error:
                if ports is None or error.errno != zmq.EADDRINUSE:
                    raise TransportUnavailable(f"zeromq cannot listen at {host}: {error}") from error
            else:
                assert bound.port is not None
                return bound.port
        raise TransportUnavailable(f"zeromq: every port of {ports} is taken; give a longer range")

    def _answer_requests(self) -> None:
        """Answer those that have arrived, at most `WINDOW` of them, so that `serve` soon sees when the lease ends."""
        for frames in recv_arrived(self._socket, WINDOW, self._guard):
            if len(frames) == 2 and len(frames[1]) >= REQUEST_HEADER.size:
                self._answer(frames[0], frames[1])

    def _answer(self, peer: bytes, request: bytes) -> None:
        token, number = REQUEST_HEADER.unpack_from(request)
        if not secrets.compare_digest(token, self._token):
            self._answer_stranger(peer, number)
            return
        if (len(request) - REQUEST_HEADER.size) % RANGE.size:
            return
        ranges = list(RANGE.iter_unpack(memoryview(request)[REQUEST_HEADER.size :]))
        taken = self._next_buffer()
        if taken is None:
            return
        buffer, address = taken
        status, span = (OK, None) if number == GREETING and not ranges else self._read(ranges, address)
        if span is not None and not self._wait_for_limit(span[1]):
            self._buffers.give_back(buffer)
            return
        try:
            self._socket.send(peer, _MORE)
        except zmq.ZMQError as error:  # the fork is gone, and nothing was sent
            self._buffers.give_back(buffer)
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise
            return
        try:
            self._socket.send(ANSWER_HEADER.pack(number, status), _LAST if span is None else _MORE)
            if span is not None:
                self._sender.send(*span)
            self._socket.send(peer, _MORE)
            self._sender.send_notice(buffer)
        except zmq.ZMQError as error:  # the fork is gone; its buffer is not used again on this lease
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise

    def _answer_stranger(self, peer: bytes, number: int) -> None:
        """Tell a peer that it is not this lease's: once, and not more of them than `MAX_STRANGERS`."""
        if peer in self._strangers or len(self._strangers) >= MAX_STRANGERS:
            return
        self._strangers.add(peer)
        try:
            self._socket.send_multipart([peer, ANSWER_HEADER.pack(number, NOT_THIS_SEED)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # it is gone
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise

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
            if self._closing.wait(min(seconds, GUARD_SECONDS)):
                return False
            self._guard.look(time.monotonic())
        return True

    def _next_buffer(self) -> tuple[int, int] | None:
        """The number and the address of a buffer, once libzmq has released one; None when the lease ends first."""
        while not self._closing.is_set():
            taken = self._buffers.take()
            if taken is not None:
                return taken
            for number in self._sender.wait(self._waker.fileno()):
                self._buffers.give_back(number)
        return None
