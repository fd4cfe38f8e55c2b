"""One connection of a fork to the seed, for one lease: it is used once the seed has answered a greeting on it."""

import time
from collections import deque

import zmq
from attrs import define, field, frozen

from tensorfork.errors import PeerUnreachable, TransferFailed
from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard
from tensorfork.sockets.context import Sockets
from tensorfork.sockets.port import NOBODY, TO_TOKEN
from tensorfork.sockets.zeromq import connect
from tensorfork.transports.data_port import NOT_THIS_SEED
from tensorfork.transports.zeromq.protocol import (
    ANSWER_HEADER,
    FRAME,
    GREETING,
    OK,
    REQUEST_HEADER,
)

_MONITORED = GUARDED_EVENTS | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.CLOSED
_ENDS = zmq.Event.DISCONNECTED, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
_ENDLESS = "sends what was not requested, without end"
SLACK = 128 << 10
"""Bytes that may arrive beside those that were requested: headers, and answers to heartbeats."""
LOOK_SECONDS = 0.01
"""Seconds between two looks at how much has arrived: what does not make an answer wakes nobody."""
STUCK_LOOKS = 6
"""Looks in a row at which more has arrived than one answer has, and no answer came of it, until that counts as a
message that is never whole. A part of no bytes takes 2 on the wire, and 64 in libzmq."""


@frozen
class Request:
    """Ranges that are requested together, and where each of them goes."""

    ranges: bytes
    """Packed, as they are sent."""
    targets: "list[tuple[int, int, int, int]]"
    """For each range: the index of its copy, our region, the offset in it, and the number of bytes."""
    nbytes: int
    """Of all of them together."""


@define(eq=False)
class Connection:
    """A connection to the seed, and the requests in flight on it, in order, each with its number.

    Attributes:
        ready: whether the seed has answered the greeting, so that requests may be sent.
        refused: whether there was no connection at all; libzmq does not try again.
        greeted: whether there is a connection, on which the greeting has been sent. Its answer may take as long as the
            seed's interpreter is busy.
    """

    socket: "zmq.Socket[bytes]"
    monitor: "zmq.Socket[bytes]"
    seed: Address
    token: bytes
    frame: int
    in_flight: deque[tuple[int, Request]] = field(factory=deque)
    ready: bool = False
    refused: bool = False
    greeted: bool = False
    look_at: float | None = None
    """When to look at how much has arrived; None: once something arrives."""
    _guard: ConnectionGuard = field(init=False)
    _stuck_looks: int = 0

    @classmethod
    def begin(
        cls, sockets: Sockets, seed: Address, token: bytes, recv_queue: int, frame: int, in_flight: int
    ) -> "Connection":
        """Begin to connect. libzmq queues `recv_queue` answers at most, an answer has `frame` bytes at most, and those
        that were requested and have not come `in_flight` together.
        """
        socket = sockets.new(zmq.DEALER, max_message=FRAME, queue=0)  # the window bounds what is sent
        socket.rcvhwm = 2 * recv_queue - 1  # an answer is one message, and an empty one comes behind it
        socket.reconnect_ivl = -1
        made = cls(socket, sockets.monitor(socket, _MONITORED), seed, token, frame)
        most = in_flight + SLACK
        made._guard = ConnectionGuard(
            made.monitor,
            unfinished=most,
            in_all=most,
            stuck=most,
            stuck_in_all=most,
            on_event=made._handle_event,
        )
        made._guard.watch(seed.port or 0, bound=False)
        connect(socket, seed)
        return made

    def register(self, poller: zmq.Poller) -> None:
        """Wait for what can happen on it."""
        poller.register(self.socket, zmq.POLLIN if self.greeted else zmq.POLLIN | zmq.POLLOUT)
        poller.register(self.monitor, zmq.POLLIN)
        poller.register(self._guard.arrivals(), zmq.POLLIN)
        self.look_at = None

    def advance(self, events: "dict[zmq.Socket[bytes] | int, int]", poller: zmq.Poller) -> bool:
        """Handle what the poller has seen, and greet. True if answers to requests can be received.

        Raises `TransferFailed` where the connection has ended, from a `PeerUnreachable` where what listens there is not
        the seed.
        """
        if self.monitor in events:
            self._look()
        self._look_if_due(events, poller)
        seen = events.get(self.socket, 0)
        if seen & zmq.POLLOUT and not self.greeted:
            self._send_greeting()
            poller.modify(self.socket, zmq.POLLIN)
        if seen & zmq.POLLIN and not self.ready:
            self._recv_greeting()
            return False
        return bool(seen & zmq.POLLIN)

    def _look_if_due(self, events: "dict[zmq.Socket[bytes] | int, int]", poller: zmq.Poller) -> None:
        """Look once `LOOK_SECONDS` have passed since something arrived, so that each arrival does not wake the fork."""
        now = time.monotonic()
        if self.look_at is None:
            if self._guard.arrivals() in events:
                poller.unregister(self._guard.arrivals())
                self.look_at = now + LOOK_SECONDS
        elif now >= self.look_at:
            if self._look():
                self.look_at = now + LOOK_SECONDS
            else:
                poller.register(self._guard.arrivals(), zmq.POLLIN)
                self.look_at = None

    def _look(self) -> bool:
        """Look at how much has arrived; whether anything has. Raises as `advance` does, also where that is more than a
        seed has to send.
        """
        arrived = self._guard.look(time.monotonic())
        self._stuck_looks = self._stuck_looks + 1 if self._guard.unfinished > self.frame + SLACK else 0
        if self._stuck_looks > STUCK_LOOKS:
            raise TransferFailed(f"{self.seed} {_ENDLESS}")
        return arrived

    def received(self, *nbytes: int) -> None:
        """Frames of so many bytes were received, the parts of one message."""
        self._guard.account(*nbytes)
        self._stuck_looks = 0

    def close(self) -> None:
        """Stop watching. Call it before the sockets are closed."""
        self._guard.close()

    def _handle_event(self, event: zmq.Event) -> None:
        if event == zmq.Event.CLOSED:  # of a connection that was never made
            self.refused = True
        elif event in _ENDS:
            why = _ENDLESS if self._guard.ended else "closed the connection, or died"
            raise TransferFailed(f"{self.seed} {why}")

    def _send_greeting(self) -> None:
        try:
            self.send(GREETING)
        except zmq.Again as error:
            raise TransferFailed(f"{self.seed} closed the connection, or died") from error
        self.greeted = True

    def send(self, number: int, ranges: bytes = b"") -> None:
        """Send a request. Raises `zmq.Again` where there is no connection any more."""
        self.socket.send(TO_TOKEN + self.token + REQUEST_HEADER.pack(number) + ranges, zmq.NOBLOCK)

    def _recv_greeting(self) -> None:
        frames = self.socket.recv_multipart(zmq.NOBLOCK)
        self.received(*map(len, frames))
        if frames == [NOBODY]:
            reason = PeerUnreachable(NOT_THIS_SEED)
            raise TransferFailed(f"{self.seed}: {NOT_THIS_SEED}") from reason
        if frames != [ANSWER_HEADER.pack(GREETING, OK)]:
            raise TransferFailed(f"{self.seed} sent something that is not the answer to a greeting")
        self.ready = True
