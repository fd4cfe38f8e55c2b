"""The seed's end of its connections to forks: one thread, and one ROUTER socket.

`Listener` decodes requests and hands each to the seed, which replies at once or later. It does not know what the
messages mean. The fork's end is `tensorfork.wire.conversation`.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import zmq

from tensorfork.errors import LeaseEnded, PeerUnreachable, ProtocolError
from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zeromq import bind, heartbeats, new_context, new_socket, poll_timeout, recv_arrived
from tensorfork.wire import messages

SendReply = Callable[..., None]
"""Sends the reply to one request: takes the reply, and the frames behind it. Called once, from any thread."""

log = logging.getLogger("tensorfork")

MAX_QUEUED = 256
"""Messages queued for a fork that does not read them; further ones are dropped."""

COPY_BELOW = 1 << 10
"""Frames of fewer bytes are copied when they are sent. Longer ones, such as a layout's pages, are sent from where they
are: they are the same bytes for every fork."""

MAX_RECEIVED = 100
"""Requests received in a row before replies are sent."""


class Listener:
    """The seed's end. Its thread calls the two functions that it is given; neither may block.

    `on_request(peer, message, payload, reply)`: `payload` is the frame behind the message, empty for most messages.
    `on_gone(peer)`: this fork's connection has ended. May be called more than once.

    Bytes on the port that are not a request are answered with `Refused` where they can be answered, and are dropped
    otherwise. A connection without a sign of life for `stall` seconds is ended.
    """

    def __init__(
        self,
        address: Address,
        on_request: Callable[[bytes, Any, bytes, SendReply], None],
        on_gone: Callable[[bytes], None],
        stall: float,
    ) -> None:
        """Bind to the address. Raises `OSError` when it is taken, or not one of this host."""
        self._on_request, self._on_gone = on_request, on_gone
        self._waker = Waker()
        with ExitStack() as stack:
            stack.callback(self._waker.close)
            self._context = new_context()
            stack.callback(self._context.destroy, linger=0)
            self._socket = new_socket(self._context, zmq.ROUTER, max_message=messages.MAX_MESSAGE, queue=MAX_QUEUED)
            self._socket.copy_threshold = COPY_BELOW
            self._socket.router_mandatory = True
            heartbeats(self._socket, stall)
            self._guard = ConnectionGuard(self._socket.get_monitor_socket(GUARDED_EVENTS), on_gone=on_gone)
            stack.callback(self._guard.close)
            stack.callback(self._socket.disable_monitor)
            try:
                self.address = bind(self._socket, address)
            except zmq.ZMQError as error:
                raise OSError(error.errno, f"cannot listen at {address}: {error}") from error
            self._guard.watch(self.address.port or 0)
            stack.pop_all()
        self._outbox: deque[Sequence[bytes]] = deque()
        self._to_end: deque[bytes] = deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-seed", daemon=True)

    def start(self, tick: Callable[[], float | None]) -> None:
        """Start the thread. It calls `tick` before each poll; `tick` returns when it must be called again
        (`time.monotonic()`), or None if only a request matters. Where there is no thread, the listener is closed.
        """
        self._tick = tick
        try:
            self._thread.start()
        except BaseException:
            self._release()
            raise

    def send(self, peer: bytes, message: messages.Reply, number: int = 0, frames: Sequence[bytes] = ()) -> None:
        """Queue a message for a fork, from any thread. It is dropped if the fork is gone or does not read."""
        self._outbox.append([peer, messages.encode(message, number), *frames])
        self._waker.wake()

    def end(self, peer: bytes) -> None:
        """End a fork's connection, from any thread; `on_gone` follows."""
        self._to_end.append(peer)
        self._waker.wake()

    def close(self, deadline: float) -> None:
        """Stop the thread and close the socket, from any thread. A second call does nothing."""
        self._ended.set()
        self._waker.wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        elif self._thread.ident is None:
            self._release()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        self._guard.register(poller)
        try:
            while not self._ended.is_set():
                next_tick = self._tick()
                ready = dict(poller.poll(None if next_tick is None else poll_timeout(next_tick)))
                if self._waker.fileno() in ready:
                    self._waker.clear()
                if self._socket in ready:
                    self._receive()
                while self._to_end:
                    self._guard.end(self._to_end.popleft())
                self._guard.look(time.monotonic())
                self._send_queued()
        finally:
            self._release()

    def _receive(self) -> None:
        for frames in recv_arrived(self._socket, MAX_RECEIVED, self._guard):
            if len(frames) in (2, 3):
                self._dispatch(*frames)

    def _dispatch(self, peer: bytes, frame: bytes, payload: bytes = b"") -> None:
        try:
            if len(frame) > messages.MAX_REQUEST:
                raise ProtocolError(f"a request of {len(frame):,} bytes came; it may have {messages.MAX_REQUEST:,}")
            number, message = messages.decode(frame, messages.REQUESTS)
        except messages.OtherVersion as error:
            reason = f"the seed speaks version {messages.VERSION} of the tensorfork protocol, the fork another"
            self.send(peer, messages.Refused(messages.VERSION_CODE, reason), error.number)
            return
        except ProtocolError as error:
            number = error.number if isinstance(error, messages.Malformed) else 0
            self.send(peer, messages.Refused(messages.MALFORMED, str(error)[:1000]), number)
            return

        def reply(answer: messages.Reply, frames: Sequence[bytes] = ()) -> None:
            self.send(peer, answer, number, frames)

        try:
            self._on_request(peer, message, payload, reply)
        except Exception as error:  # one request must not end the thread that answers all
            log.exception("answering a %s failed", type(message).__name__)
            reply(messages.Refused(messages.BUSY, f"the seed failed to answer: {error!r:.1000}"))

    def _send_queued(self) -> None:
        while self._outbox:
            frames = self._outbox.popleft()
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:  # EHOSTUNREACH: the fork is gone; EAGAIN: it does not read
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    raise
                if error.errno == zmq.EHOSTUNREACH:
                    self._on_gone(frames[0])

    def _release(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._guard.close()
        self._context.destroy(linger=0)
        self._waker.close()


class SeedChannel:
    """The seed's end of a lease's channel; a `tensorfork.transports.base.Channel`."""

    MAX_UNREAD = 64
    rate_limit = None
    """It is the fork's end that is told one."""

    def __init__(self, listener: Listener, peer: bytes, lease: bytes) -> None:
        self._listener, self._peer, self._lease = listener, peer, lease
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = False

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.transports.base.Channel`. Never waits: messages are few and small."""
        self._listener.send(self._peer, messages.Say(self._lease), frames=[messages.check_channel_message(message)])

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.transports.base.Channel`."""
        try:
            message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnreachable("the fork said nothing on its channel by the deadline") from None
        if message is None:
            self._inbox.put(None)
            raise LeaseEnded("the lease has ended")
        return message

    def check(self) -> None:
        """See `tensorfork.transports.base.Channel`."""
        if self._ended:
            raise LeaseEnded("the lease has ended")

    def deliver(self, message: bytes) -> bool:
        """Add a message from the fork. False, without adding it, when `MAX_UNREAD` messages wait already."""
        if self._inbox.qsize() >= self.MAX_UNREAD:
            return False
        self._inbox.put(message)
        return True

    def end(self) -> None:
        """End the channel: `recv` raises `LeaseEnded`, in threads that wait in it too."""
        self._ended = True
        self._inbox.put(None)
