"""Bytes over ZeroMQ: works between any two processes that can reach one another, with what is always installed.

The fork asks for stretches of the leased regions; the seed answers with frames that lie over the tensors' own memory,
and the fork receives them straight into place. Each of the fork's connections has a window of requests under way, long
enough that nobody waits for a question. That costs the seed nothing, whose frames are not copied; and a fork's libzmq
stops reading when a few answers wait to be taken. So neither side ever holds more than that beyond the model, and a
fork that stops reading holds up nobody.

Memory of GPUs passes through bounded, pinned buffers on either side: while libzmq sends one, the next is filled.

A request is ``token, number, (region, offset, nbytes) ...``; its answer, ``number and status, bytes ...``. The token is
the lease's, from the bootstrap: without it, and outside the regions, nothing is served.
"""

import os
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any, ClassVar

import torch
import zmq
from attrs import define, frozen

from tensorfork.errors import PeerUnreachable, ProtocolError, TransferFailed, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.interpreter.c_allocator import retain_freed_memory
from tensorfork.memory.staging import HostAccess, PinnedBuffer
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.sockets.address import Address, resolve
from tensorfork.sockets.monitor import recv_event
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zero_copy import ZeroCopySender
from tensorfork.sockets.zmq_sockets import bind, connect, new_context, new_socket, poll_timeout
from tensorfork.transports.base import Channel, Export, Facts, Session, Site, Transport

FRAME = 2 << 20
"""Bytes of one answer at most. Smaller ones cost more switches between threads, larger ones leave the cache."""
WINDOW = 16
"""Requests under way on a connection."""
AHEAD = 3
"""Answers that a fork's libzmq takes from a connection before they are asked for, with up to four connections."""
SLOTS = 16
"""Pinned buffers in a seed with GPUs, of a frame each; a fork has half as many."""
STRETCHES = 64
"""Stretches in one request."""
FREED = 4 << 20
"""Bytes of freed memory that the C library is to keep in a fork: what libzmq receives into, again and again."""
SEND_BUFFER = 256 << 10
"""Bytes of the kernel's send buffer where both sides are on one host: by itself it grows to megabytes, out of the
processor's cache, and costs a third of the speed. Between hosts the kernel knows better."""

_HEAD = struct.Struct("<16sQ")
_STRETCH = struct.Struct("<QQQ")
_ANSWER = struct.Struct("<QB")
_OFFER = struct.Struct("<16sI")
_OK, _OUTSIDE = 0, 1
_MAX_REQUEST = _HEAD.size + STRETCHES * _STRETCH.size


class ZeroMQ(Transport):
    """The transport that is always there.

    Args:
        connections: how many the fork opens to the seed, 1 to 16; by default one for every two cores, and at most 4.
        ports: the range in which the seed listens, one port for each lease; any free one by default.
    """

    name: ClassVar[str] = "zeromq"
    piece = 16 << 20

    def __init__(self, *, connections: int | None = None, ports: range | None = None) -> None:
        if connections is None:
            connections = max(1, min(4, (os.cpu_count() or 1) // 2))
        if not 1 <= connections <= 16:
            raise ValueError(f"connections must be 1 to 16, not {connections}")
        self._connections, self._ports = connections, ports

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`: which host this is."""
        return {"host": process.host_id()}

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> "_Export":
        """See `Transport.export`."""
        return _Export(regions, site.bind, self._ports, on_host=fork.get("host") == process.host_id())

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> "_Session":
        """See `Transport.open`."""
        try:
            token, port = _OFFER.unpack(offer)
        except struct.error as error:
            raise ProtocolError(f"zeromq: the seed's offer is not one of this transport's: {error}") from error
        try:
            seed = resolve(Address(host, port), deadline)
        except PeerUnreachable as error:
            raise TransportUnavailable(str(error)) from error
        return _Session(token, seed, regions, self._connections)


class _Export(Export):
    def __init__(self, regions: Sequence[Region], host: str, ports: range | None, *, on_host: bool) -> None:
        self._token = secrets.token_bytes(16)
        self._context = _context(2)
        try:
            self._memory = HostAccess(regions, SLOTS, FRAME)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._socket = new_socket(self._context, zmq.ROUTER, max_message=_MAX_REQUEST, queue=4 * WINDOW)
        self._socket.router_mandatory = True
        if on_host:
            self._socket.sndbuf = SEND_BUFFER
        self._lender = ZeroCopySender(self._socket)
        self._in_use: dict[int, Sequence[zmq.MessageTracker]] = {}
        self._bell, self._ended = Waker(), threading.Event()
        self._serving = threading.Lock()
        try:
            port = self._bind(host, ports)
        except BaseException:
            self.close(time.monotonic())
            raise
        self.offer = _OFFER.pack(self._token, port)

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`."""
        with self._serving:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._bell.fileno(), zmq.POLLIN)
            while not self._ended.is_set():
                if self._socket in dict(poller.poll()):
                    self._answer_some()

    def close(self, deadline: float) -> bool:
        """See `Export.close`."""
        if self._ended.is_set():
            return True
        self._ended.set()
        self._bell.ring()
        served = self._serving.acquire(timeout=max(0.1, deadline - time.monotonic()))
        if served:
            self._context.destroy(linger=0)
            self._memory.close()
            self._bell.close()
            self._serving.release()
        return served

    def _bind(self, host: str, ports: range | None) -> int:
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

    def _answer_some(self) -> None:
        for _ in range(WINDOW):  # then look whether the lease has ended
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    raise
                continue
            if len(frames) == 2 and len(frames[1]) >= _HEAD.size:
                self._answer(frames[0], frames[1])

    def _answer(self, peer: bytes, request: bytes) -> None:
        token, number = _HEAD.unpack_from(request)
        if not secrets.compare_digest(token, self._token) or (len(request) - _HEAD.size) % _STRETCH.size:
            return  # not one of ours: not a word
        stretches = list(_STRETCH.iter_unpack(memoryview(request)[_HEAD.size :]))
        allowed = bool(stretches) and self._memory.holds(stretches, FRAME)
        answer = [peer, _ANSWER.pack(number, _OK if allowed else _OUTSIDE)]
        try:
            if not allowed:
                self._socket.send_multipart(answer, zmq.NOBLOCK)
            elif self._memory.staged(stretches):
                slot = self._free_slot()
                self._in_use[id(slot)] = self._send_tracked([*answer, *self._memory.read(stretches, slot)])
            else:
                self._socket.send_multipart(answer, zmq.NOBLOCK | zmq.SNDMORE)
                self._lender.send(self._memory.addresses(stretches))
        except zmq.ZMQError as error:  # it is gone, or asks more than it reads
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise

    def _send_tracked(self, frames: Sequence[Any]) -> Sequence[zmq.MessageTracker]:
        """Send frames, none of them copied; what says when libzmq has let go of each. A frame that is kept is never let
        go of, so they are not.
        """
        sent = [zmq.Frame(frame, track=True, copy=False) for frame in frames]
        trackers = [frame.tracker for frame in sent if frame.tracker is not None]
        self._socket.send_multipart(sent, zmq.NOBLOCK, copy=False)
        return trackers

    def _free_slot(self) -> PinnedBuffer:
        """The slot used longest ago, once libzmq has let go of it."""
        slot = self._memory.next_slot()
        for tracker in self._in_use.pop(id(slot), ()):
            while not tracker.done and not self._ended.is_set():
                try:
                    tracker.wait(0.1)
                except zmq.NotDone:
                    continue
        return slot


@frozen
class _Request:
    """Stretches that are asked for together, and where they go; each with the number of its copy."""

    asked: bytes
    targets: Sequence[tuple[int, int, int, int]]
    """Of each: its copy, our region, the offset in it and the bytes."""


@define
class _Line:
    """One connection, and what is under way on it, in order."""

    socket: "zmq.Socket[bytes]"
    monitor: "zmq.Socket[bytes]"
    waiting: deque[tuple[int, _Request]]
    up: bool = False


class _Session(Session):
    fabric = "tcp"

    def __init__(self, token: bytes, seed: Address, regions: Sequence[Region], connections: int) -> None:
        self._token, self._seed = token, seed
        self._context = _context(min(connections, 4))
        try:
            self._memory = HostAccess(regions, SLOTS // 2, FRAME)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        retain_freed_memory(FREED)
        ahead = max(1, min(AHEAD, 4 * AHEAD // connections))
        self._lines = [self._connect(ahead) for _ in range(connections)]
        self._number = 0
        self._landing: deque[tuple[torch.cuda.Event, int, int]] = deque()
        self._broken = False

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        if self._broken:
            raise TransferFailed("this connection failed before; open another session")
        if not copies:
            return
        self._check_places(copies)
        left = [copy.nbytes for copy in copies]
        self._memory.wait_for_callers()
        requests = self._requests(copies)
        poller = zmq.Poller()
        for line in self._lines:
            poller.register(line.socket, zmq.POLLIN if line.up else zmq.POLLIN | zmq.POLLOUT)
            poller.register(line.monitor, zmq.POLLIN)
        self._broken = True  # until it is over: after a failure, answers to nobody may be under way
        try:
            while self._ask(requests):
                self._check(deadline, cancel)
                ready = dict(poller.poll(min(poll_timeout(deadline), 200)))
                for line in self._lines:
                    if line.monitor in ready:
                        self._notice(line)
                    if ready.get(line.socket, 0) & zmq.POLLOUT:
                        line.up = True
                        poller.modify(line.socket, zmq.POLLIN)
                    if ready.get(line.socket, 0) & zmq.POLLIN:
                        self._receive(line, left, done)
                self._land(left, done)
            while self._landing:
                self._land(left, done, wait=True)
        except zmq.ZMQError as error:
            raise TransferFailed(f"the transfer from {self._seed} failed: {error}") from error
        finally:
            self._memory.synchronize()  # after a failure, nothing is written any more
        self._broken = False

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        for line in self._lines:
            if not line.socket.closed:
                line.socket.disable_monitor()
        self._context.destroy(linger=0)
        self._memory.close()
        self._lines = []

    def _connect(self, ahead: int) -> _Line:
        line = new_socket(self._context, zmq.DEALER, max_message=FRAME, queue=0)  # the window bounds what is sent
        line.rcvhwm = ahead
        line.reconnect_ivl = -1
        monitor = line.get_monitor_socket(zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)
        connect(line, self._seed)
        return _Line(line, monitor, deque())

    def _requests(self, copies: Sequence[Copy]) -> Iterator[_Request]:
        asked, targets, nbytes = bytearray(), list[tuple[int, int, int, int]](), 0
        for i, copy in enumerate(copies):
            start = 0
            while start < copy.nbytes:
                size = min(FRAME - nbytes, copy.nbytes - start)
                asked += _STRETCH.pack(copy.region, copy.offset + start, size)
                targets.append((i, copy.into, copy.at + start, size))
                nbytes, start = nbytes + size, start + size
                if nbytes == FRAME or len(targets) == STRETCHES:
                    yield _Request(bytes(asked), targets)
                    asked, targets, nbytes = bytearray(), [], 0
        if targets:
            yield _Request(bytes(asked), targets)

    def _ask(self, requests: Iterator[_Request]) -> bool:
        """Fill the windows, the emptiest first. False when nothing is under way any more."""
        while True:
            line = min((line for line in self._lines if line.up), key=lambda line: len(line.waiting), default=None)
            if line is None or len(line.waiting) >= WINDOW:
                return True
            request = next(requests, None)
            if request is None:
                return any(line.waiting for line in self._lines)
            self._number += 1
            try:
                line.socket.send(_HEAD.pack(self._token, self._number) + request.asked, zmq.NOBLOCK)
            except zmq.Again as error:  # the window is never what libzmq holds at most
                raise TransferFailed(f"{self._seed} closed the connection, or died") from error
            line.waiting.append((self._number, request))

    def _receive(self, line: _Line, left: list[int], done: Callable[[int], None]) -> None:
        for _ in range(AHEAD):  # then look whether it is to go on
            try:
                head = line.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            number, request = line.waiting.popleft()
            if len(head) != _ANSWER.size or _ANSWER.unpack(head)[0] != number:
                raise TransferFailed(f"{self._seed} answered something else than was asked")
            if _ANSWER.unpack(head)[1] != _OK:
                raise TransferFailed(f"{self._seed} refused: a stretch lies outside the leased regions")
            self._take(line.socket, request, left, done)

    def _take(
        self, socket: "zmq.Socket[bytes]", request: _Request, left: list[int], done: Callable[[int], None]
    ) -> None:
        """The frames of an answer, each to its place. One that is missing shows too: nothing comes, or the next
        answer's head, which has another length.
        """
        for i, region, at, nbytes in request.targets:
            slot = self._memory.slot_for(region)
            target = self._memory.view(region, at, nbytes) if slot is None else slot.view[:nbytes]
            try:
                came = socket.recv_into(target, flags=zmq.NOBLOCK)
            except zmq.Again:
                came = -1
            if came != nbytes:
                raise TransferFailed(f"{self._seed} sent another number of bytes than was asked for")
            if slot is None:
                self._landed(i, nbytes, left, done)
            else:
                slot.event = self._memory.land(slot, region, at, nbytes)
                self._landing.append((slot.event, i, nbytes))
        if socket.get(zmq.RCVMORE):
            raise TransferFailed(f"{self._seed} sent more than was asked for")

    def _land(self, left: list[int], done: Callable[[int], None], wait: bool = False) -> None:
        """Take note of what has reached its GPU."""
        while self._landing and (wait or self._landing[0][0].query()):
            event, i, nbytes = self._landing.popleft()
            event.synchronize()
            self._landed(i, nbytes, left, done)

    def _landed(self, i: int, nbytes: int, left: list[int], done: Callable[[int], None]) -> None:
        left[i] -= nbytes
        if not left[i]:
            done(i)

    def _check_places(self, copies: Sequence[Copy]) -> None:
        """Of our side; the seed looks at its own."""
        for copy in copies:
            if not self._memory.holds([(copy.into, copy.at, copy.nbytes)], copy.nbytes):
                raise TransferFailed(f"{copy} lies outside our regions")

    def _check(self, deadline: float, cancel: Event) -> None:
        if cancel.is_set():
            raise TransferFailed("the transfer was cancelled")
        if time.monotonic() >= deadline:
            raise TransferFailed(f"{self._seed} had not sent everything by the deadline")

    def _notice(self, line: _Line) -> None:
        recv_event(line.monitor)
        raise TransferFailed(f"{self._seed} closed the connection, or died")


def _context(io_threads: int) -> "zmq.Context[zmq.Socket[bytes]]":
    try:
        return new_context(io_threads)
    except OSError as error:
        raise TransportUnavailable(f"zeromq: {error.strerror}") from error
