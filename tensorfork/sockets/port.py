"""A TCP port on which this process serves its peers: one thread, and one ROUTER socket.

Several may serve on it. A message that begins with `TO_TOKEN` and a token goes to whoever has `attach`ed with that
token; all others go to the owner of the port. So one port is enough where a container or a firewall opens one.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import zmq
from attrs import field, frozen

from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard, ConnectionKey
from tensorfork.sockets.context import Sockets
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zero_copy import Releases, ZeroCopySender
from tensorfork.sockets.zeromq import bind, heartbeats, poll_timeout, recv_arrived

log = logging.getLogger("tensorfork")

TO_TOKEN = b"\xc1"
"""The first byte of a message to a token: one that msgpack never uses."""
TOKEN_BYTES = 16
NOBODY = TO_TOKEN
"""The answer to a message whose token nobody has attached with."""

MAX_MESSAGE = 1 << 20
"""Bytes of a frame from a peer."""
MAX_QUEUED = 256
"""Messages queued for a peer that does not read them; further ones are dropped."""
MAX_STRANGERS = 256
"""Connections at once that are told that nobody has their token; others are told nothing."""
COPY_BELOW = 1 << 10
"""Frames of fewer bytes are copied when they are sent. Longer ones, such as a layout's pages, are sent from where they
are: they are the same bytes for every peer."""
MAX_RECEIVED = 100
"""Messages received in a row before others are sent."""

PAUSE = 0.1
"""Seconds for which nothing is done after an error that nobody expected."""
LOOK_PAUSE = 0.002
"""Seconds between two looks at what has arrived on connections, and at where there is room to send again, which is told
in the same way: while much is sent, that is all the time."""


@frozen
class Peer:
    """Who sent a message: the id by which he is answered, and his connection, if that is known."""

    id: bytes
    connection: ConnectionKey | None = field(eq=False)

    def is_closed(self) -> bool:
        """Whether the descriptor of his connection is closed. False where it is not known."""
        return self.connection is not None and self.connection.is_closed()


Receive = Callable[[Peer, bytes], None]
"""Takes a message to a token, without the token, on the port's thread. It must not wait."""


class Port:
    """One port. It is bound when this is made, and serves from `start` on.

    Args:
        address: what to bind to.
        on_message: takes a message to the owner: the peer's id, and the frames. It must not wait.
        on_gone: told of a peer whose connection has ended, maybe more than once.
        stall: seconds without a sign of life after which a connection is ended.
        keep: whether a peer's connection is not to be ended to make room for others.
    """

    def __init__(
        self,
        address: Address,
        on_message: Callable[[bytes, Sequence[bytes]], None] = lambda peer, frames: None,
        on_gone: Callable[[bytes], None] = lambda peer: None,
        stall: float = 15.0,
        keep: Callable[[bytes], bool] = lambda peer: False,
    ) -> None:
        """Bind. Raises `OSError` when the address is taken, or not one of this host; `ResourceExhausted`."""
        self._on_message, self._on_gone, self._keep = on_message, on_gone, keep
        self._waker = Waker()
        with ExitStack() as stack:
            stack.callback(self._waker.close)
            self._sockets = Sockets(many_bytes=True)
            stack.callback(self._sockets.close)
            self._socket = self._sockets.new(zmq.ROUTER, max_message=MAX_MESSAGE, queue=MAX_QUEUED)
            self._socket.copy_threshold = COPY_BELOW
            self._socket.router_mandatory = True
            heartbeats(self._socket, stall)
            self._guard = ConnectionGuard(
                self._sockets.monitor(self._socket, GUARDED_EVENTS), on_gone=self._forget, keep=self._is_kept
            )
            stack.callback(self._guard.close)
            try:
                self.address = bind(self._socket, address)
            except zmq.ZMQError as error:
                raise OSError(error.errno, f"cannot listen at {address}: {error}") from error
            self._guard.watch(self.address.port or 0)
            stack.pop_all()
        self._sender = ZeroCopySender(self._socket)
        self._lock = threading.Lock()
        """Whoever uses the socket holds it: the port's thread, or one that lends memory."""
        self._outbox: deque[Sequence[bytes]] = deque()
        self._gone: deque[bytes] = deque()
        self._to_end: deque[bytes] = deque()
        self._attached: dict[bytes, Receive] = {}
        self._token_of: dict[bytes, bytes] = {}
        """By peer, the token that he has used."""
        self._strangers: set[bytes] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-seed", daemon=True)

    def start(self, tick: Callable[[], float | None] = lambda: None) -> None:
        """Start the thread. It calls `tick` before each poll; `tick` returns when it must be called again
        (`time.monotonic()`), or None if only a message matters. Where there is no thread, the port is closed.
        """
        self._tick = tick
        try:
            self._thread.start()
        except BaseException:
            self._release()
            raise

    def send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Queue a message, from any thread. It is dropped if the peer is gone or does not read."""
        self._outbox.append([peer, *frames])
        self._waker.wake()

    def attach(self, token: bytes, receive: Receive) -> None:
        """Have messages to this token received, from any thread."""
        self._attached[token] = receive

    def detach(self, token: bytes) -> None:
        """No more messages to this token, but one that is being received. From any thread."""
        self._attached.pop(token, None)

    def lend(self, peer: Peer, header: bytes, memory: tuple[int, int] | None, releases: Releases, number: int) -> None:
        """Send a message of a header and, if there is any, memory (address, bytes), which is not copied. From the
        thread that waits for `releases`, which is not the port's: they tell the number once the memory is free; at
        once, where nothing was sent.

        It is sent on the caller's thread: to wake the port's for each answer cost a quarter of the speed.
        """
        with self._lock:
            lent = not self._socket.closed and self._lend(peer, header, memory, releases, number)
            # what has come since the port's thread looked is not shown by the descriptor that it waits for any more
            has_come = not self._socket.closed and self._has_arrivals()
        if not lent:
            releases.tell(number)
        if has_come or self._gone:
            self._waker.wake()

    def end(self, peer: bytes) -> None:
        """End a peer's connection, from any thread. What waits to be sent over it is dropped; `on_gone` follows."""
        self._to_end.append(peer)
        self._waker.wake()

    def set_send_buffer(self, peer: Peer, nbytes: int) -> None:
        """Set the kernel's send buffer of a peer's connection. For `Receive` functions."""
        if peer.connection is not None:
            self._guard.set_send_buffer(peer.connection, nbytes)

    def close(self, deadline: float) -> None:
        """Stop the thread and close the socket, from any thread. A second call does nothing."""
        self._ended.set()
        self._waker.wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))
        elif self._thread.ident is None:
            self._release()

    def _run(self) -> None:
        poller, arrivals = zmq.Poller(), int(self._socket.get(zmq.FD))
        poller.register(arrivals, zmq.POLLIN)  # of the socket itself it would ask without the lock
        poller.register(self._waker.fileno(), zmq.POLLIN)
        self._guard.register(poller)
        look_at: float | None = None
        try:
            while not self._ended.is_set():
                try:
                    look_at = self._turn(poller, look_at)
                except Exception:  # one event must not end the thread that serves all
                    if self._socket.closed:
                        raise
                    log.exception("serving %s failed; it goes on", self.address)
                    self._ended.wait(PAUSE)
        finally:
            self._release()

    def _turn(self, poller: zmq.Poller, look_at: float | None) -> float | None:
        """Wait, and handle what there is. Takes and returns until when the guard's next look is to wait."""
        times = self._tick(), self._guard.next_look, look_at
        wake = min((one for one in times if one is not None), default=None)
        ready = dict(poller.poll(None if wake is None else poll_timeout(wake)))
        if self._waker.fileno() in ready:
            self._waker.clear()
        with self._lock:
            if not self._has_arrivals():
                self._guard.all_received()
            self._receive()
        while self._to_end:
            self._guard.end(self._to_end.popleft())
        look_at = self._look(poller, look_at, time.monotonic())
        with self._lock:
            self._send_queued()
            if self._has_arrivals():
                self._waker.wake()
        while self._gone:
            self._forget(self._gone.popleft())
        return look_at

    def _look(self, poller: zmq.Poller, look_at: float | None, now: float) -> float | None:
        """Have the guard look, unless that is to wait until `look_at`. Returns until when the next look is to wait."""
        if look_at is not None and now < look_at and not self._guard.is_due(now):
            return look_at
        arrived = self._guard.look(now)
        if arrived and look_at is None:
            poller.unregister(self._guard.arrivals())
        elif not arrived and look_at is not None:
            poller.register(self._guard.arrivals(), zmq.POLLIN)
        return now + LOOK_PAUSE if arrived else None

    def _has_arrivals(self) -> bool:
        """Whether there is something to receive. To ask makes the descriptor unreadable that tells of it."""
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def _receive(self) -> None:
        for frames in recv_arrived(self._socket, MAX_RECEIVED, self._guard):
            peer, *rest = [frame.bytes for frame in frames]
            if len(rest) == 1 and rest[0].startswith(TO_TOKEN):
                self._receive_to_token(Peer(peer, self._guard.connection_of(frames)), rest[0])
            elif rest:
                self._on_message(peer, rest)

    def _receive_to_token(self, peer: Peer, message: bytes) -> None:
        token = message[len(TO_TOKEN) : len(TO_TOKEN) + TOKEN_BYTES]
        receive = self._attached.get(token)  # the hash is keyed: how long this takes says nothing of other tokens
        if receive is not None:
            self._token_of[peer.id] = token
            receive(peer, message[len(TO_TOKEN) + TOKEN_BYTES :])
        elif peer.id not in self._strangers and len(self._strangers) < MAX_STRANGERS:
            self._strangers.add(peer.id)
            self._outbox.append([peer.id, NOBODY])

    def _is_kept(self, peer: bytes) -> bool:
        """Whether a connection is not to be ended to make room: its owner keeps it, or its token is attached."""
        return self._keep(peer) or self._token_of.get(peer) in self._attached

    def _forget(self, peer: bytes) -> None:
        self._strangers.discard(peer)
        self._token_of.pop(peer, None)
        self._on_gone(peer)

    def _send_queued(self) -> None:
        while self._outbox:
            frames = self._outbox.popleft()
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.ZMQError as error:  # EHOSTUNREACH: the peer is gone; EAGAIN: it does not read
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    raise
                if error.errno == zmq.EHOSTUNREACH:
                    self._gone.append(frames[0])

    def _lend(self, peer: Peer, header: bytes, memory: tuple[int, int] | None, releases: Releases, number: int) -> bool:
        """Send memory, and the notice that it was sent. Whether any is lent, so that the number will come."""
        lent = False
        try:
            self._sender.send_part(peer.id, more=True)
            self._sender.send_part(header, more=memory is not None)
            if memory is not None:
                self._sender.send(*memory)
                lent = True
                self._sender.send_part(peer.id, more=True)
                self._sender.send_notice(releases, number)
        except zmq.ZMQError as error:
            if lent:
                releases.no_notice(number, peer.is_closed)
            if error.errno == zmq.EHOSTUNREACH:
                self._gone.append(peer.id)
        return lent

    def _release(self) -> None:
        with self._lock:
            self._guard.close()
            self._sockets.close()
        self._waker.close()
