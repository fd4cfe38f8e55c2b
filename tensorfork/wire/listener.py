"""The seed's end of the conversation: one thread, one ROUTER socket."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from tensorfork.errors import PeerUnreachable, ProtocolError
from tensorfork.sockets.address import Address
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zmq_sockets import bind, new_context, new_socket, poll_timeout
from tensorfork.wire import messages

SendReply = Callable[..., None]
"""Takes a reply and the frames behind it; may be called from any thread, once."""

log = logging.getLogger("tensorfork")

UNREAD = 256
"""Replies that wait for a fork which does not read; more are dropped."""

COPY_BELOW = 1 << 10
"""Longer frames are sent from where they lie: a layout's pages are the same for every fork and every request."""


class Listener:
    """The seed's end. `handle(peer, message, said, answer)` runs on its thread, and must not wait; `said` is the frame
    behind the message, empty for most. So does `gone(peer)`, for a fork that was to be sent something and is not there.

    Survives whatever is sent to its port; what cannot be read is answered with `Refused` where it can be, and dropped.
    """

    def __init__(
        self, address: Address, handle: Callable[[bytes, Any, bytes, SendReply], None], gone: Callable[[bytes], None]
    ) -> None:
        self._handle, self._gone = handle, gone
        self._context = new_context()
        self._socket = new_socket(self._context, zmq.ROUTER, max_message=messages.MAX_MESSAGE, queue=UNREAD)
        self._socket.copy_threshold = COPY_BELOW
        self._socket.router_mandatory = True
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
        try:
            self.address = bind(self._socket, address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, f"cannot listen at {address}: {error}") from error
        self._outbox: deque[Sequence[bytes]] = deque()
        self._bell = Waker()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-seed", daemon=True)

    def start(self, tick: Callable[[], float | None]) -> None:
        """Begin. `tick` runs on the thread now and then, and says when next (monotonic), or None."""
        self._tick = tick
        self._thread.start()

    def say(self, peer: bytes, message: messages.Reply, number: int = 0, frames: Sequence[bytes] = ()) -> None:
        """Send to a fork, from any thread. A fork that is gone or does not read is not waited for."""
        self._outbox.append([peer, messages.encode(message, number), *frames])
        self._bell.ring()

    def close(self, deadline: float) -> None:
        """Stop, from any thread; a second time does nothing."""
        self._ended.set()
        self._bell.ring()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        elif self._thread.ident is None:
            self._shut()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        try:
            while not self._ended.is_set():
                wake = self._tick()
                ready = dict(poller.poll(None if wake is None else poll_timeout(wake)))
                if self._bell.fileno() in ready:
                    self._bell.silence()
                if self._socket in ready:
                    self._receive()
                self._send()
        finally:
            self._shut()

    def _receive(self) -> None:
        for _ in range(100):  # then let others, and what is to be sent, have their turn
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    raise
                continue  # a peer that vanished in the middle of a message
            if len(frames) in (2, 3):
                self._dispatch(*frames)

    def _dispatch(self, peer: bytes, frame: bytes, said: bytes = b"") -> None:
        try:
            if len(frame) > messages.MAX_REQUEST:
                raise ProtocolError(f"a request of {len(frame):,} bytes came; it may have {messages.MAX_REQUEST:,}")
            number, message = messages.decode(frame, messages.REQUESTS)
        except messages.OtherVersion as error:
            reason = f"the seed speaks version {messages.VERSION} of the tensorfork protocol, the fork another"
            self.say(peer, messages.Refused(messages.VERSION_CODE, reason), error.number)
            return
        except ProtocolError as error:
            number = error.number if isinstance(error, messages.Malformed) else 0
            self.say(peer, messages.Refused(messages.MALFORMED, str(error)[:1000]), number)
            return

        def answer(reply: messages.Reply, frames: Sequence[bytes] = ()) -> None:
            self.say(peer, reply, number, frames)

        try:
            self._handle(peer, message, said, answer)
        except Exception as error:  # one request must not end the thread that answers all
            log.exception("answering a %s failed", type(message).__name__)
            answer(messages.Refused(messages.BUSY, f"the seed failed to answer: {error!r:.1000}"))

    def _send(self) -> None:
        while self._outbox:
            frames = self._outbox.popleft()
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:  # EHOSTUNREACH: it is gone; EAGAIN: it does not read
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    raise
                if error.errno == zmq.EHOSTUNREACH:
                    self._gone(frames[0])

    def _shut(self) -> None:
        self._context.destroy(linger=0)
        self._bell.close()


class SeedChannel:
    """A lease's channel, at the seed's end: the listener's thread puts in what the fork says."""

    BOUND = 64

    def __init__(self, listener: Listener, peer: bytes, lease: bytes) -> None:
        self._listener, self._peer, self._lease = listener, peer, lease
        self._box: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.transports.base.Channel`. Never waits: messages are few and small."""
        self._listener.say(self._peer, messages.Say(self._lease), frames=[messages.check_channel_message(message)])

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.transports.base.Channel`."""
        try:
            message = self._box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnreachable("the fork said nothing on its channel by the deadline") from None
        if message is None:
            self._box.put(None)
            raise PeerUnreachable("the lease has ended")
        return message

    def hear(self, message: bytes) -> bool:
        """Put in what the fork said; False when it has said more than anybody reads."""
        if self._box.qsize() >= self.BOUND:
            return False
        self._box.put(message)
        return True

    def end(self) -> None:
        """Wake whoever waits: nothing more will come."""
        self._box.put(None)
