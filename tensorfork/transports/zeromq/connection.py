"""One connection of a fork to the seed, for one lease: it is used once the seed has answered a greeting on it."""

from collections import deque

import zmq
from attrs import define, field, frozen

from tensorfork.errors import PeerUnreachable, TransferFailed
from tensorfork.sockets.address import Address
from tensorfork.sockets.context import Sockets
from tensorfork.sockets.monitor import recv_event
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

_MONITORED = zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.CLOSED


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
    in_flight: deque[tuple[int, Request]] = field(factory=deque)
    ready: bool = False
    refused: bool = False
    greeted: bool = False

    @classmethod
    def begin(cls, sockets: Sockets, seed: Address, token: bytes, recv_queue: int) -> "Connection":
        """Begin to connect. `recv_queue` answers are received before they are asked for, at most."""
        socket = sockets.new(zmq.DEALER, max_message=FRAME, queue=0)  # the window bounds what is sent
        socket.rcvhwm = 2 * recv_queue - 1  # an answer is one message, and an empty one comes behind it
        socket.reconnect_ivl = -1
        monitor = sockets.monitor(socket, _MONITORED)
        connect(socket, seed)
        return cls(socket, monitor, seed, token)

    def register(self, poller: zmq.Poller) -> None:
        """Wait for what can happen on it."""
        poller.register(self.socket, zmq.POLLIN if self.greeted else zmq.POLLIN | zmq.POLLOUT)
        poller.register(self.monitor, zmq.POLLIN)

    def advance(self, events: "dict[zmq.Socket[bytes] | int, int]", poller: zmq.Poller) -> bool:
        """Handle what the poller has seen, and greet. True if answers to requests can be received.

        Raises `TransferFailed` where the connection has ended, from a `PeerUnreachable` where what listens there is not
        the seed.
        """
        if self.monitor in events:
            self._handle_event()
        seen = events.get(self.socket, 0)
        if seen & zmq.POLLOUT and not self.greeted:
            self._send_greeting()
            poller.modify(self.socket, zmq.POLLIN)
        if seen & zmq.POLLIN and not self.ready:
            self._recv_greeting()
            return False
        return bool(seen & zmq.POLLIN)

    def _handle_event(self) -> None:
        if recv_event(self.monitor) == zmq.Event.CLOSED:  # of a connection that was never made
            self.refused = True
            return
        raise TransferFailed(f"{self.seed} closed the connection, or died")

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
        if frames == [NOBODY]:
            reason = PeerUnreachable(NOT_THIS_SEED)
            raise TransferFailed(f"{self.seed}: {NOT_THIS_SEED}") from reason
        if frames != [ANSWER_HEADER.pack(GREETING, OK)]:
            raise TransferFailed(f"{self.seed} sent something that is not the answer to a greeting")
        self.ready = True
