"""The fork's end of the connection to a seed, over ZeroMQ: one DEALER socket.

`Conversation` sends requests, each with a deadline, and carries a channel for each lease. It does not know what the
messages mean. The seed's end is `tensorfork.wire.listener`.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import zmq

from tensorfork.errors import (
    ForkCancelled,
    LeaseEnded,
    PeerUnreachable,
    ProtocolError,
    TensorForkError,
)
from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard
from tensorfork.sockets.context import Sockets
from tensorfork.sockets.zeromq import connect, heartbeats, poll_timeout, recv_arrived
from tensorfork.wire import messages
from tensorfork.wire.inboxes import Inboxes
from tensorfork.wire.refusals import error_of

M = TypeVar("M")

T = TypeVar("T")

RECONNECT_MS, RECONNECT_MAX_MS = 50, 500
"""Milliseconds until a refused connection is tried again: at first, and at most, as libzmq doubles it each time."""
POLL_MS = 200
"""Milliseconds of one poll, at most. Between two polls it is checked whether the conversation was closed meanwhile."""

HELLO_NUMBER = 1
"""The number of the first request."""
MAX_READ = 100
"""Messages that are looked at in a row for the answer to it."""
ADVICE = "Check that the seed runs and that the address is the one it printed."

MAX_PARTS = 1 + 4 * messages.MAX_FRAMES
"""Parts of a message of the seed's, at most."""

MAX_FAILED_HANDSHAKES = 3
"""Handshakes that the peer breaks off before it counts as something else than a seed: one may be a seed just ending."""

_MONITORED = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.CONNECT_RETRIED
    | GUARDED_EVENTS
)

UNFINISHED, UNFINISHED_ROW = 3 << 19, 384
"""Bytes of a message of the seed's that may have arrived before it is whole; and how many more for each row, such as a
tensor, that the seed has announced. A part of no bytes takes 2 on the wire, and 64 in libzmq."""
STALL = 15.0
"""Seconds without a sign of life of the seed's process, by default, after which its connection counts as lost."""
LOOK_SECONDS = 0.02
"""Seconds between two looks at the connection, at least, while nothing is asked of the seed."""


class Conversation:
    """The fork's end of the connection. One thread at a time sends requests; others may use the leases' channels.

    Once `cancel` is set, no request begins, and those that wait raise `ForkCancelled` within `POLL_MS`. Once the seed's
    connection is seen to be gone, every request raises `PeerUnreachable` at once. It counts as gone, too, when nothing
    has come from the seed's libzmq, which answers pings, for `stall` seconds.

    Attributes:
        peer: the seed's address, as it was given, for errors.
        resolved: the numeric address that it is connected to.
        connected: whether the two ends have shaken hands.
    """

    def __init__(
        self, peer: Address, resolved: Address, cancel: threading.Event | None = None, stall: float = STALL
    ) -> None:
        """Begin to connect."""
        self.peer, self.resolved, self._stall = peer, resolved, stall
        self._cancel = threading.Event() if cancel is None else cancel
        self._leaving = False
        self._sockets = Sockets(many_bytes=False)
        try:
            self._open_socket()
        except BaseException:
            self._sockets.close()
            raise
        self._numbers = itertools.count(HELLO_NUMBER + 1)
        self._lock = threading.RLock()
        self._inboxes = Inboxes()
        self.connected = False
        self._refused_connects = 0
        self._failed_handshakes = 0
        self._disconnect_follows = False
        self._closed = False
        self._lost, self._step, self._next_look = "", "hello", 0.0

    def _open_socket(self) -> None:
        self._socket = self._sockets.new(zmq.DEALER, max_message=messages.MAX_REPLY, queue=0)
        self._socket.reconnect_ivl = RECONNECT_MS
        self._socket.reconnect_ivl_max = RECONNECT_MAX_MS
        heartbeats(self._socket, self._stall)
        self._guard = ConnectionGuard(self._sockets.monitor(self._socket, _MONITORED), on_event=self._handle_event)
        self._guard.allow(UNFINISHED)
        self._guard.watch(self.resolved.port or 0, bound=False)
        connect(self._socket, self.resolved)

    def request(
        self,
        message: messages.Request,
        expect: type[M],
        deadline: float,
        step: str,
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[M, list[bytes]]:
        """Send a request, call `meanwhile`, and return the reply and the frames behind it.

        Raises:
            PeerUnreachable: no reply by the deadline, or the peer went away; names the address and the step.
            PeerRefused, SeedAsleep, SeedChanged, SeedMoved, TransportUnavailable: the seed refused.
            ProtocolError: the peer is not a seed of our version, or its reply is not of type `expect`.
            ForkCancelled: `cancel` is set.
        """
        self.check_cancelled(step)
        number = next(self._numbers)
        with self._lock:
            self._send_frames([messages.encode(message, number)], deadline, step)
            if meanwhile is not None:
                meanwhile()
            while True:
                frames = self._recv_frames(deadline, step)
                if (reply := self._reply_in(frames, number, expect, step)) is not None:
                    return reply, frames[1:]

    def register(self, poller: zmq.Poller, *, to_send: bool) -> None:
        """Register what shows that `try_hello` can go on."""
        poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT if to_send else zmq.POLLIN)
        self._guard.register(poller)

    def try_send_hello(self, hello: messages.Hello) -> bool:
        """Send a hello, if that does not wait. Raises as `request` does."""
        self._handle_events("hello")
        with suppress(zmq.Again):
            self._socket.send_multipart([messages.encode(hello, HELLO_NUMBER)], zmq.NOBLOCK)
            return True
        return False

    def try_recv_welcome(self) -> messages.Welcome | None:
        """The answer to it, if it has come. Raises as `request` does."""
        for received in recv_arrived(self._socket, MAX_READ, self._guard, MAX_PARTS):
            frames = [frame.bytes for frame in received]
            if (reply := self._reply_in(frames, HELLO_NUMBER, messages.Welcome, "hello")) is not None:
                return reply
        self._handle_events("hello")
        return None

    def why_silent(self) -> str:
        """What is known of a peer that has not answered."""
        if self.connected:
            return "it answers nothing"
        return "the connection is refused" if self._refused_connects else "nobody answers there"

    def send(self, lease: bytes, message: bytes, deadline: float) -> None:
        """Send a message on a lease's channel. Raises `PeerUnreachable`."""
        messages.check_channel_message(message)
        with self._lock:
            self._send_frames([messages.encode(messages.Say(lease), 0), message], deadline, "channel")

    def recv(self, lease: bytes, deadline: float) -> bytes:
        """The next message on a lease's channel.

        Raises `PeerUnreachable`, also at the deadline, and `LeaseEnded` once the seed has ended the lease.
        `ForkCancelled` is raised where it would wait.
        """
        while True:
            said = self._inboxes.get(lease)
            if isinstance(said, messages.Ended):
                raise LeaseEnded(f"{self.peer}: the seed has ended the lease: {said.why.reason}")
            if said is not None:
                return said
            with self._lock:
                if self._inboxes.is_empty(lease):
                    frames = self._recv_frames(deadline, "channel")
                    _, message = self._decode(frames[0], "channel")
                    if not self._deliver(message, frames, "channel") and isinstance(message, messages.Refused):
                        raise self._error_from(message, "channel")

    def share(self, lease: bytes, granted: float | None) -> float | None:
        """What a lease's fork may read now, in bytes a second; `granted` with the lease. For any thread."""
        return self._inboxes.share(lease, granted)

    def check_cancelled(self, step: str) -> None:
        """Raise `ForkCancelled` once `cancel` is set. For any thread."""
        if self._cancel.is_set() and not self._leaving:
            raise ForkCancelled(f"{self.peer}: the fork was cancelled (at step {step})")

    def expect_rows(self, rows: int) -> None:
        """The seed has announced so many tensors, storages and names: its messages may be longer."""
        with self._lock:
            self._guard.allow(UNFINISHED + rows * UNFINISHED_ROW)

    @contextmanager
    def watched(self, step: str) -> Iterator[None]:
        """Inside, a thread looks at the connection as soon as something arrives: a seed that sends messages without an
        end is cut off, also while nothing is asked of it.
        """
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                self._guard.arrived(POLL_MS / 1000)
                with suppress(TensorForkError):  # who asks next hears of it
                    self.check_there(step)
                done.wait(LOOK_SECONDS)

        thread = threading.Thread(target=watch, name="tensorfork-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def check_there(self, step: str) -> None:
        """Raise `PeerUnreachable` if the seed's connection is gone. For any thread; looks every `LOOK_SECONDS`."""
        if time.monotonic() >= self._next_look and not self._lost and self._lock.acquire(blocking=False):
            try:
                self._next_look = time.monotonic() + LOOK_SECONDS
                if not self._closed:
                    self._handle_events(step)
            finally:
                self._lock.release()
        if self._lost:
            self._check_open(step)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, `cancel` is ignored: for the last words on a lease, which give it back."""
        self._leaving = True
        try:
            yield
        finally:
            self._leaving = False

    def close(self) -> None:
        """Close the connection.

        Waits until no other thread uses the socket; those that wait in `recv` get `PeerUnreachable`, as later calls do.
        """
        self._closed = True
        with self._lock:
            if not self._socket.closed:
                self._guard.close()
            self._sockets.close(linger_ms=200)

    def _deliver(self, message: Any, frames: Sequence[bytes], step: str) -> bool:
        """Keep what is said of a lease, unasked. False if it is nothing of the kind."""
        try:
            return self._inboxes.put(message, frames)
        except ProtocolError as error:
            raise ProtocolError(f"{self.peer}: {error} (at step {step})") from error

    def _send_frames(self, frames: Sequence[bytes], deadline: float, step: str) -> None:
        self._call_when(zmq.POLLOUT, lambda: self._socket.send_multipart(frames, zmq.NOBLOCK), deadline, step)

    def _recv_frames(self, deadline: float, step: str) -> list[bytes]:
        return self._call_when(zmq.POLLIN, self._recv_one, deadline, step)

    def _recv_one(self) -> list[bytes]:
        for frames in recv_arrived(self._socket, 1, self._guard, MAX_PARTS):
            return [frame.bytes for frame in frames]
        raise zmq.Again

    def _call_when(self, ready: int, call: Callable[[], T], deadline: float, step: str) -> T:
        """Call it as soon as the socket is ready for it."""
        self._check_open(step)
        while True:
            if self._socket.poll(0, ready):
                with suppress(zmq.Again):  # the connection was lost between the poll and the call
                    return call()
            self._wait(ready, deadline, step)

    def _check_open(self, step: str) -> None:
        if self._closed:
            raise PeerUnreachable(f"{self.peer}: the conversation is over (at step {step})")
        if self._lost:
            raise PeerUnreachable(f"{self.peer}: {self._lost} (at step {step})")

    def _wait(self, ready: int, deadline: float, step: str) -> None:
        """Wait until the socket is ready or the connection has an event, for `POLL_MS` at most."""
        self._check_open(step)
        self.check_cancelled(step)
        if time.monotonic() >= deadline:
            raise PeerUnreachable(f"{self.peer}: {self.why_silent()} (at step {step}, by the deadline). {ADVICE}")
        poller = zmq.Poller()
        poller.register(self._socket, ready)
        self._guard.register(poller)
        poller.poll(min(poll_timeout(deadline), POLL_MS))
        self._handle_events(step)

    def _handle_events(self, step: str) -> None:
        """Handle the events that have come."""
        self._step = step
        self._guard.look(time.monotonic())

    def _reply_in(self, frames: Sequence[bytes], number: int, expect: type[M], step: str) -> M | None:
        """The reply to the request of this number, if it is that. Raises as `request` does."""
        reply_number, reply = self._decode(frames[0], step)
        if self._deliver(reply, frames, step) or reply_number != number:
            return None  # what is said unasked, or the reply to an earlier request, which was given up
        if isinstance(reply, messages.Refused):
            raise self._error_from(reply, step)
        if isinstance(reply, expect):
            return reply
        raise ProtocolError(f"{self.peer}: a {type(reply).__name__} answered, at step {step}")

    def _handle_event(self, event: zmq.Event) -> None:
        if self._lost:
            return
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self.connected = True
        elif event == zmq.Event.DISCONNECTED and self.connected:
            # the seed has ended our leases: nothing more can be asked, also if libzmq connects again
            self._lost = self._why_lost()
            self._check_open(self._step)
        elif event == zmq.Event.CONNECT_RETRIED:
            self._refused_connects += 1
        elif event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            self._failed_handshakes, self._disconnect_follows = self._failed_handshakes + 1, True
            if self._failed_handshakes >= MAX_FAILED_HANDSHAKES:
                raise self._not_a_seed()
        elif event == zmq.Event.DISCONNECTED and self._disconnect_follows:
            self._disconnect_follows = False  # libzmq connects again
        elif event in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.DISCONNECTED):
            raise self._not_a_seed()  # after these, libzmq does not connect again

    def _why_lost(self) -> str:
        if self._guard.ended:
            return "the seed sent a message without an end, so that its connection was closed. It is no seed, or broken"
        if self._guard.silence < self._stall / 2:  # a third of it passes between two pings
            return "the seed closed the connection, or died"
        if self._guard.unwatched < self._stall / 4:
            return (
                f"the seed gave no sign of life for {self._stall:g} s (stall=): its process is stopped, or the network "
                "between is down"
            )
        return f"the seed closed the connection, died, or gave no sign of life for {self._stall:g} s (stall=)"

    def _not_a_seed(self) -> ProtocolError:
        return ProtocolError(
            f"{self.peer}: what listens there does not speak ZeroMQ, or not as a seed does; we speak version "
            f"{messages.VERSION} of the tensorfork protocol. Check the port: it should be the one of seed.address."
        )

    def _decode(self, frame: bytes, step: str) -> tuple[int, Any]:
        try:
            if len(frame) > messages.MAX_MESSAGE:
                raise ProtocolError(f"a reply of {len(frame):,} bytes came; it may have {messages.MAX_MESSAGE:,}")
            return messages.decode(frame, messages.REPLIES)
        except ProtocolError as error:
            raise ProtocolError(
                f"{self.peer}: {error} (we speak version {messages.VERSION}), at step {step}. Use the same version of "
                "tensorfork on both sides, and the address the seed printed."
            ) from error

    def _error_from(self, refused: messages.Refused, step: str) -> TensorForkError:
        return error_of(refused, f"{self.peer}: {refused.reason} (at step {step})")


def peer_address(text: Any) -> Address:
    """The address of a seed, as a caller gives it. Raises `ValueError` or `TypeError`."""
    if not isinstance(text, str):
        raise TypeError(f"peer must be a seed's address, such as tcp://10.0.0.7:4180, not {type(text).__name__}")
    address = Address.parse(text)
    if address.port is None or address.is_wildcard:
        raise ValueError(f"{text!r} is where a seed listens, not where it is found; use what seed.address says")
    return address
