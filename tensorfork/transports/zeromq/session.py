"""The fork's side of a lease: it requests ranges of the seed's regions and receives them into its own."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event

import torch
import zmq

from tensorfork.errors import LeaseEnded, PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.interpreter.c_allocator import retain_freed_memory
from tensorfork.memory.staging import HostAccess
from tensorfork.regions import Copy, Region
from tensorfork.sockets.address import Address
from tensorfork.sockets.context import Sockets
from tensorfork.sockets.port import NOBODY
from tensorfork.sockets.race import SILENCE
from tensorfork.sockets.zeromq import poll_timeout
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import check_going_on
from tensorfork.transports.zeromq.buffers import open_share
from tensorfork.transports.zeromq.connection import Connection, Request
from tensorfork.transports.zeromq.protocol import (
    ANSWER_HEADER,
    LEAST_WINDOW,
    MAX_RANGES,
    MOVED,
    OK,
    RANGE,
    WINDOW,
)

RECV_QUEUE = 3
"""Answers that libzmq queues for each connection (its high-water mark), with up to four connections."""
POLL_MS = 200
"""Milliseconds of one poll, at most: between two it is checked whether the fork was cancelled."""
RETAINED_BYTES = 4 << 20
"""Bytes of freed memory that the C library is asked to keep: libzmq receives into it again and again."""


class ZeroMQSession(Session):
    """One lease, read over several connections. Not for several threads at once."""

    fabric = "tcp"

    def __init__(
        self,
        token: bytes,
        seed: Address,
        regions: Sequence[Region],
        channel: Channel,
        connections: int,
        frame: int,
        alone: int,
    ) -> None:
        self._seed, self._channel, self._alone = seed, channel, alone or sys.maxsize
        with ExitStack() as stack:
            slots: Sequence[tuple[int, int]] = ()
            if any(region.device != "cpu" for region in regions):
                share = open_share(regions)
                stack.callback(share.close)
                slots, frame = [(slot, share.slot_bytes) for slot in share.slots], min(frame, share.slot_bytes)
            self._frame = frame
            self._memory = HostAccess(regions, slots)
            stack.callback(self._memory.close)
            sockets = Sockets(many_bytes=True)
            stack.callback(sockets.close)
            retain_freed_memory(RETAINED_BYTES)
            recv_queue = max(1, min(RECV_QUEUE, 4 * RECV_QUEUE // connections))
            self._window = max(LEAST_WINDOW, WINDOW // connections)
            self._connections: list[Connection] = []
            for _ in range(connections):
                begun = Connection.begin(sockets, seed, token, recv_queue, frame, self._window * frame)
                stack.callback(begun.close)
                self._connections.append(begun)
            self._resources = stack.pop_all()
        self._last_number = 0
        self._gpu_copies: deque[tuple[torch.cuda.Event, Request]] = deque()
        """Requests whose bytes may still be on their way from a pinned buffer to a GPU."""
        self._failed = False

    def ready(self, deadline: float) -> None:
        """See `Session.ready`: waits until the seed has answered on one connection."""
        poller, silent_at = self._poller()
        try:
            while not any(connection.ready for connection in self._connections):
                self._channel.check()
                self._check_reached(silent_at)
                if time.monotonic() >= deadline:
                    raise PeerUnreachable("nobody answers there by the deadline")
                events = dict(poller.poll(self._milliseconds(deadline)))
                for connection in self._connections:
                    connection.advance(events, poller)
        except LeaseEnded as error:
            raise TransportUnavailable(str(error)) from None
        except PeerUnreachable as error:
            raise TransportUnavailable(self._unreached(error)) from error
        except TransferFailed as error:
            if isinstance(error.__cause__, PeerUnreachable):
                raise TransportUnavailable(self._unreached(error.__cause__)) from error.__cause__
            raise TransportUnavailable(f"zeromq: {error}") from error

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`. After a failure the session cannot pull again."""
        if self._failed:
            raise TransferFailed("this connection failed before; open another session")
        if not copies:
            return
        self._check_destinations(copies)
        remaining = [copy.nbytes for copy in copies]
        self._memory.wait_for_current_streams()
        requests = self._requests(copies)
        poller, silent_at = self._poller()
        self._failed = True  # until all has arrived: after a failure, answers may still be on their way
        try:
            while self._send_requests(requests):
                check_going_on(deadline, cancel, source=self._seed)
                self._check_reached(silent_at)
                events = dict(poller.poll(self._milliseconds(deadline)))
                for connection in self._connections:
                    if connection.advance(events, poller):
                        self._recv_answers(connection, remaining, done)
                self._report_gpu_copies(remaining, done)
            while self._gpu_copies:
                self._report_gpu_copies(remaining, done, wait=True)
        except PeerUnreachable as error:
            raise TransferFailed(self._unreached(error)) from error
        except zmq.ZMQError as error:
            raise TransferFailed(f"the transfer from {self._seed} failed: {error}") from error
        finally:
            self._memory.synchronize()  # after a failure too, no GPU is written to once this has returned
        self._failed = False

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        self._resources.close()
        self._connections = []

    def _unreached(self, why: object) -> str:
        return f"zeromq: further connections to the seed at {self._seed} cannot be made: {why}"

    def _milliseconds(self, deadline: float) -> int:
        """How long a poll may last."""
        looks = (connection.look_at for connection in self._connections)
        return min(POLL_MS, *(poll_timeout(one) for one in (deadline, *looks) if one is not None))

    def _poller(self) -> tuple[zmq.Poller, float]:
        """What waits for all connections, and when there must be one."""
        poller = zmq.Poller()
        for connection in self._connections:
            connection.register(poller)
        return poller, time.monotonic() + SILENCE

    def _check_reached(self, silent_at: float) -> None:
        """Raise `PeerUnreachable` when there is no connection, and none will be."""
        if any(connection.greeted for connection in self._connections):
            return
        if all(connection.refused for connection in self._connections):
            raise PeerUnreachable("the connection is refused")
        if time.monotonic() >= silent_at:
            raise PeerUnreachable("nobody answers there")

    def _requests(self, copies: Sequence[Copy]) -> Iterator[Request]:
        """Requests of at most a frame and `MAX_RANGES` ranges for all copies, in order; each into one device."""
        ranges, targets, nbytes = bytearray(), list[tuple[int, int, int, int]](), 0
        for i, copy in enumerate(copies):
            if targets and (
                copy.nbytes >= self._alone
                or targets[-1][3] >= self._alone
                or self._memory.device(targets[-1][1]) != self._memory.device(copy.into)
            ):
                yield Request(bytes(ranges), targets, nbytes)
                ranges, targets, nbytes = bytearray(), [], 0
            start = 0
            while start < copy.nbytes:
                size = min(self._frame - nbytes, copy.nbytes - start)
                ranges += RANGE.pack(copy.region, copy.offset + start, size)
                targets.append((i, copy.into, copy.at + start, size))
                nbytes, start = nbytes + size, start + size
                if nbytes == self._frame or len(targets) == MAX_RANGES:
                    yield Request(bytes(ranges), targets, nbytes)
                    ranges, targets, nbytes = bytearray(), [], 0
        if targets:
            yield Request(bytes(ranges), targets, nbytes)

    def _send_requests(self, requests: Iterator[Request]) -> bool:
        """Fill the window of every connection of which half is empty. False when all requests have been answered.

        Several requests in a row wake the seed's port once.
        """
        refilled = [one for one in self._connections if one.ready and len(one.in_flight) <= self._window // 2]
        while True:
            connection = min(refilled, key=lambda one: len(one.in_flight), default=None)
            if connection is None or len(connection.in_flight) >= self._window:
                return True
            request = next(requests, None)
            if request is None:
                return any(connection.in_flight for connection in self._connections)
            self._last_number += 1
            try:
                connection.send(self._last_number, request.ranges)
            except zmq.Again as error:  # libzmq's queue has no limit, so there is no connection any more
                raise TransferFailed(f"{self._seed} closed the connection, or died") from error
            connection.in_flight.append((self._last_number, request))

    def _recv_answers(self, connection: Connection, remaining: list[int], done: Callable[[int], None]) -> None:
        """Receive those that have arrived, at most `RECV_QUEUE` of them, so that `pull` soon sees a cancellation."""
        socket = connection.socket
        for _ in range(2 * RECV_QUEUE):
            try:
                header = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if not header and not socket.get(zmq.RCVMORE):
                connection.received(0)
                continue  # behind an answer; the seed learns from it what has been sent
            if header == NOBODY:
                raise TransferFailed(f"{self._seed} has ended the lease")
            number, request = connection.in_flight.popleft() if connection.in_flight else (None, None)
            if request is None or len(header) != ANSWER_HEADER.size or ANSWER_HEADER.unpack(header)[0] != number:
                raise TransferFailed(f"{self._seed} sent something that is not the answer to a request")
            self._check_status(ANSWER_HEADER.unpack(header)[1])
            self._recv_bytes(socket, request)
            connection.received(len(header), request.nbytes)
            if self._memory.device(request.targets[0][1]) == "cpu":
                self._count(request, remaining, done)

    def _check_status(self, status: int) -> None:
        if status == MOVED:
            raise TransferFailed(
                f"{self._seed} cannot read that memory any more: what it published was freed, moved or unmapped. Have "
                "it publish again"
            )
        if status != OK:
            raise TransferFailed(f"{self._seed} refused a request: a range lies outside what it published")

    def _recv_bytes(self, socket: "zmq.Socket[bytes]", request: Request) -> None:
        """Receive the bytes of an answer: into their place on the CPU, and towards it on a GPU."""
        targets = [target[1:] for target in request.targets]
        try:
            if self._memory.device(targets[0][0]) != "cpu":
                buffer = self._memory.next_buffer()
                self._check_size(socket, request, socket.recv_into(buffer.view[: request.nbytes], flags=zmq.NOBLOCK))
                self._gpu_copies.append((self._memory.write(buffer, targets), request))
            elif len(targets) == 1:
                self._check_size(socket, request, socket.recv_into(self._memory.view(*targets[0]), flags=zmq.NOBLOCK))
            else:
                received = memoryview(socket.recv(zmq.NOBLOCK, copy=False).buffer)
                self._check_size(socket, request, len(received))
                start = 0
                for target in targets:
                    self._memory.view(*target)[:] = received[start : start + target[2]]
                    start += target[2]
        except zmq.Again as error:
            raise TransferFailed(f"{self._seed} sent fewer frames than were requested") from error

    def _check_size(self, socket: "zmq.Socket[bytes]", request: Request, received: int) -> None:
        if received != request.nbytes or socket.get(zmq.RCVMORE):
            raise TransferFailed(f"{self._seed} sent another number of bytes than was requested")

    def _report_gpu_copies(self, remaining: list[int], done: Callable[[int], None], wait: bool = False) -> None:
        """Count the bytes whose copy to the GPU has ended, in order; with `wait`, wait for each."""
        while self._gpu_copies and (wait or self._gpu_copies[0][0].query()):
            event, request = self._gpu_copies.popleft()
            event.synchronize()
            self._count(request, remaining, done)

    def _count(self, request: Request, remaining: list[int], done: Callable[[int], None]) -> None:
        """Count bytes that have arrived, and report each copy of which they are the last."""
        for i, _, _, nbytes in request.targets:
            remaining[i] -= nbytes
            if not remaining[i]:
                done(i)

    def _check_destinations(self, copies: Sequence[Copy]) -> None:
        """Raise `TransferFailed` for a copy outside our regions. The seed checks its own side."""
        for copy in copies:
            if not self._memory.contains([(copy.into, copy.at, copy.nbytes)], copy.nbytes):
                raise TransferFailed(f"{copy} lies outside our regions")
