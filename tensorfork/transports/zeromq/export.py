"""The seed's side of a lease: it answers requests with the bytes of its regions."""

import secrets
import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq

from tensorfork.errors import TransportUnavailable
from tensorfork.memory.staging import HostAccess, PinnedBuffer
from tensorfork.regions import Region
from tensorfork.sockets.address import Address
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zero_copy import ZeroCopySender
from tensorfork.sockets.zeromq import bind, new_socket, recv_arrived
from tensorfork.transports.base import Channel, Export
from tensorfork.transports.zeromq.context import new_lease_context
from tensorfork.transports.zeromq.protocol import (
    ANSWER_HEADER,
    FRAME,
    MAX_REQUEST,
    OFFER,
    OK,
    OUT_OF_BOUNDS,
    RANGE,
    REQUEST_HEADER,
    WINDOW,
)

PINNED_BUFFERS = 16
"""Pinned buffers of a lease on GPU memory, `FRAME` bytes each."""
SEND_BUFFER = 256 << 10
"""Bytes of the kernel's send buffer where both sides are on one host: by itself it grows to megabytes, out of the
processor's cache, and costs a third of the speed. Between hosts the kernel's own choice is better."""


class ZeroMQExport(Export):
    """One lease: a ROUTER socket on a port of its own. The regions' memory is used until `close` returns True."""

    def __init__(self, regions: Sequence[Region], host: str, ports: range | None, *, same_host: bool) -> None:
        self._token = secrets.token_bytes(16)
        self._context = new_lease_context(2)
        try:
            self._memory = HostAccess(regions, PINNED_BUFFERS, FRAME)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._socket = new_socket(self._context, zmq.ROUTER, max_message=MAX_REQUEST, queue=4 * WINDOW)
        self._socket.router_mandatory = True
        if same_host:
            self._socket.sndbuf = SEND_BUFFER
        self._zero_copy = ZeroCopySender(self._socket)
        self._trackers: dict[int, Sequence[zmq.MessageTracker]] = {}
        self._waker, self._closing = Waker(), threading.Event()
        self._serve_lock = threading.Lock()
        try:
            port = self._bind(host, ports)
        except BaseException:
            self.close(time.monotonic())
            raise
        self.offer = OFFER.pack(self._token, port)

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        with self._serve_lock:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._waker.fileno(), zmq.POLLIN)
            while not self._closing.is_set():
                if self._socket in dict(poller.poll()):
                    self._answer_requests()

    def close(self, deadline: float) -> bool:
        """See `Export.close`."""
        if self._closing.is_set():
            return True
        self._closing.set()
        self._waker.wake()
        stopped = self._serve_lock.acquire(timeout=max(0.1, deadline - time.monotonic()))
        if stopped:
            self._context.destroy(linger=0)
            self._memory.close()
            self._waker.close()
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
        for frames in recv_arrived(self._socket, WINDOW):
            if len(frames) == 2 and len(frames[1]) >= REQUEST_HEADER.size:
                self._answer(frames[0], frames[1])

    def _answer(self, peer: bytes, request: bytes) -> None:
        token, number = REQUEST_HEADER.unpack_from(request)
        if not secrets.compare_digest(token, self._token) or (len(request) - REQUEST_HEADER.size) % RANGE.size:
            return  # from a stranger, who learns nothing
        ranges = list(RANGE.iter_unpack(memoryview(request)[REQUEST_HEADER.size :]))
        allowed = bool(ranges) and self._memory.contains(ranges, FRAME)
        answer = [peer, ANSWER_HEADER.pack(number, OK if allowed else OUT_OF_BOUNDS)]
        try:
            if not allowed:
                self._socket.send_multipart(answer, zmq.NOBLOCK)
            elif self._memory.any_on_gpu(ranges):
                buffer = self._next_buffer()
                self._trackers[id(buffer)] = self._send_tracked([*answer, *self._memory.read(ranges, buffer)])
            else:
                self._socket.send_multipart(answer, zmq.NOBLOCK | zmq.SNDMORE)
                self._zero_copy.send(self._memory.addresses(ranges))
        except zmq.ZMQError as error:  # the fork is gone, or requests more than it reads
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise

    def _send_tracked(self, frames: Sequence[Any]) -> Sequence[zmq.MessageTracker]:
        """Send frames without copying them. Returns trackers that say when libzmq has released each frame's memory. The
        `zmq.Frame` objects must not be kept: libzmq releases the memory of a frame only when its object is gone.
        """
        sent = [zmq.Frame(frame, track=True, copy=False) for frame in frames]
        trackers = [frame.tracker for frame in sent if frame.tracker is not None]
        self._socket.send_multipart(sent, zmq.NOBLOCK, copy=False)
        return trackers

    def _next_buffer(self) -> PinnedBuffer:
        """The least recently used pinned buffer; waits until libzmq has released it, or the lease ends."""
        buffer = self._memory.next_buffer()
        for tracker in self._trackers.pop(id(buffer), ()):
            while not tracker.done and not self._closing.is_set():
                try:
                    tracker.wait(0.1)
                except zmq.NotDone:
                    continue
        return buffer
