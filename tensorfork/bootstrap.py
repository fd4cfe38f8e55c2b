"""The conversation between a fork and a seed, over ZeroMQ.

`Listener` is the seed's end: one thread and one ROUTER socket, which turns frames into messages, hands each to the
seed, and sends what the seed answers, now or later. `Conversation` is the fork's: one DEALER socket, requests with a
deadline, and a channel for each lease. Neither knows what the messages mean.
"""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from tensorfork import wire
from tensorfork.errors import (
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SeedChanged,
    TensorForkError,
    TransportUnavailable,
)
from tensorfork.sockets import Address, Bell, bind, connect, context, make, milliseconds, resolve

log = logging.getLogger("tensorfork")

M = TypeVar("M")
T = TypeVar("T")
Answer = Callable[..., None]
"""Takes a reply and the frames behind it; may be called from any thread, once."""

UNREAD = 256
"""Replies that wait for a fork which does not read; more are dropped."""
LOOK = 200
"""Milliseconds of one wait at most; between two, whoever listens looks whether the conversation is over."""
COPY_BELOW = 1 << 10
"""Longer frames are sent from where they lie: a layout's pages are the same for every fork and every request."""

_WATCHED = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.CONNECT_RETRIED
    | zmq.Event.DISCONNECTED
)


class Listener:
    """The seed's end. `handle(peer, message, said, answer)` runs on its thread, and must not wait; `said` is the frame
    behind the message, empty for most. So does `gone(peer)`, for a fork that was to be sent something and is not there.

    Survives whatever is sent to its port; what cannot be read is answered with `Refused` where it can be, and dropped.
    """

    def __init__(
        self, address: Address, handle: Callable[[bytes, Any, bytes, Answer], None], gone: Callable[[bytes], None]
    ) -> None:
        self._handle, self._gone = handle, gone
        self._context = context()
        self._socket = make(self._context, zmq.ROUTER, max_message=wire.MAX_MESSAGE, queue=UNREAD)
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
        self._bell = Bell()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorfork-seed", daemon=True)

    def start(self, tick: Callable[[], float | None]) -> None:
        """Begin. `tick` runs on the thread now and then, and says when next (monotonic), or None."""
        self._tick = tick
        self._thread.start()

    def say(self, peer: bytes, message: wire.Reply, number: int = 0, frames: Sequence[bytes] = ()) -> None:
        """Send to a fork, from any thread. A fork that is gone or does not read is not waited for."""
        self._outbox.append([peer, wire.encode(message, number), *frames])
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
                ready = dict(poller.poll(None if wake is None else milliseconds(wake)))
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
            if len(frame) > wire.MAX_REQUEST:
                raise ProtocolError(f"a request of {len(frame):,} bytes came; it may have {wire.MAX_REQUEST:,}")
            number, message = wire.decode(frame, wire.REQUESTS)
        except wire.OtherVersion as error:
            reason = f"the seed speaks version {wire.VERSION} of the tensorfork protocol, the fork another"
            self.say(peer, wire.Refused(wire.VERSION_CODE, reason), error.number)
            return
        except ProtocolError as error:
            number = error.number if isinstance(error, wire.Malformed) else 0
            self.say(peer, wire.Refused(wire.MALFORMED, str(error)[:1000]), number)
            return

        def answer(reply: wire.Reply, frames: Sequence[bytes] = ()) -> None:
            self.say(peer, reply, number, frames)

        try:
            self._handle(peer, message, said, answer)
        except Exception as error:  # one request must not end the thread that answers all
            log.exception("answering a %s failed", type(message).__name__)
            answer(wire.Refused(wire.BUSY, f"the seed failed to answer: {error!r:.1000}"))

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


class Conversation:
    """The fork's end. For one thread at a time; a lease's channel may be used from another."""

    def __init__(self, peer: str, deadline: float) -> None:
        self.peer = Address.parse(peer)
        if self.peer.port is None or self.peer.is_wildcard:
            raise ValueError(f"{peer!r} is where a seed listens, not where it is found; use what seed.address says")
        resolved = resolve(self.peer, deadline)
        self._context = context()
        self._socket = make(self._context, zmq.DEALER, max_message=wire.MAX_REPLY, queue=0)
        self._socket.reconnect_ivl = 50
        self._socket.reconnect_ivl_max = 500
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._said: dict[bytes, queue.SimpleQueue[bytes]] = {}
        self._met = False
        self._strangers = 0
        self._unanswered = False
        self._refusals = 0
        self._closed = False
        connect(self._socket, resolved)

    def ask(self, request: wire.Request, expect: type[M], deadline: float, step: str) -> tuple[M, list[bytes]]:
        """Send a request and wait for its reply, and the frames behind it.

        Raises:
            PeerUnreachable: no answer by the deadline, or the peer went away; names the address and the step.
            PeerRefused, SeedChanged, TransportUnavailable: it said no.
            ProtocolError: what answers is something else.
        """
        number = next(self._numbers)
        with self._lock:
            self._put([wire.encode(request, number)], deadline, step)
            while True:
                frames = self._get(deadline, step)
                got, message = self._read(frames[0], step)
                if isinstance(message, wire.Say):
                    self._keep(message, frames)
                elif got == number and isinstance(message, wire.Refused):
                    raise self._refusal(message, step)
                elif got == number and isinstance(message, expect):
                    return message, frames[1:]
                elif got == number:
                    raise ProtocolError(f"{self.peer}: a {type(message).__name__} answered, at step {step}")
                # else the answer to a request that was given up; not ours any more

    def say(self, lease: bytes, message: bytes, deadline: float) -> None:
        """Send on a lease's channel."""
        _bounded(message)
        with self._lock:
            self._put([wire.encode(wire.Say(lease), 0), message], deadline, "channel")

    def hear(self, lease: bytes, deadline: float) -> bytes:
        """The next message on a lease's channel."""
        box = self._said.setdefault(lease, queue.SimpleQueue())
        while True:
            try:
                return box.get_nowait()
            except queue.Empty:
                pass
            with self._lock:
                if box.empty():
                    frames = self._get(deadline, "channel")
                    _, message = self._read(frames[0], "channel")
                    if isinstance(message, wire.Say):
                        self._keep(message, frames)
                    elif isinstance(message, wire.Refused):
                        raise self._refusal(message, "channel")

    def close(self) -> None:
        """Hang up. Whoever else is just listening is waited for; who comes later is told."""
        self._closed = True
        with self._lock:
            self._socket.disable_monitor()
            self._context.destroy(linger=200)

    def _keep(self, said: wire.Say, frames: Sequence[bytes]) -> None:
        self._said.setdefault(said.lease, queue.SimpleQueue()).put(b"".join(frames[1:]))

    def _put(self, frames: Sequence[bytes], deadline: float, step: str) -> None:
        self._when(zmq.POLLOUT, lambda: self._socket.send_multipart(frames, zmq.NOBLOCK), deadline, step)

    def _get(self, deadline: float, step: str) -> list[bytes]:
        return self._when(zmq.POLLIN, lambda: self._socket.recv_multipart(zmq.NOBLOCK), deadline, step)

    def _when(self, ready: int, act: Callable[[], T], deadline: float, step: str) -> T:
        """Do it as soon as the socket is ready for it."""
        self._check_open(step)
        while True:
            if self._socket.poll(0, ready):
                with suppress(zmq.Again):  # the connection was lost just now
                    return act()
            self._wait(ready, deadline, step)

    def _check_open(self, step: str) -> None:
        if self._closed:
            raise PeerUnreachable(f"{self.peer}: the conversation is over (at step {step})")

    def _wait(self, what: int, deadline: float, step: str) -> None:
        """Until the socket is ready or something happened to the connection, or for a moment."""
        self._check_open(step)
        if time.monotonic() >= deadline:
            why = "it answers nothing" if self._met else "nobody answers there"
            if self._refusals and not self._met:
                why = "the connection is refused"
            raise PeerUnreachable(
                f"{self.peer}: {why} (at step {step}, by the deadline). Check that the seed runs and that the "
                "address is the one it printed."
            )
        poller = zmq.Poller()
        poller.register(self._socket, what)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(min(milliseconds(deadline), LOOK)))
        if self._monitor in ready:
            self._notice(zmq.Event(recv_monitor_message(self._monitor)["event"]), step)

    def _notice(self, event: zmq.Event, step: str) -> None:
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._met = True
        elif event == zmq.Event.DISCONNECTED and self._met:
            raise PeerUnreachable(f"{self.peer}: the seed closed the connection, or died (at step {step})")
        elif event == zmq.Event.CONNECT_RETRIED:
            self._refusals += 1
        elif event == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            self._strangers, self._unanswered = self._strangers + 1, True
            if self._strangers >= 3:  # once may be a seed that is just ending
                raise self._stranger()
        elif event == zmq.Event.DISCONNECTED and self._unanswered:
            self._unanswered = False  # libzmq tries again
        elif event in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.DISCONNECTED):
            raise self._stranger()  # and libzmq does not try again

    def _stranger(self) -> ProtocolError:
        return ProtocolError(
            f"{self.peer}: what listens there does not speak ZeroMQ, or not as a seed does; we speak version "
            f"{wire.VERSION} of the tensorfork protocol. Check the port: it should be the one of seed.address."
        )

    def _read(self, frame: bytes, step: str) -> tuple[int, Any]:
        try:
            return wire.decode(frame, wire.REPLIES)
        except ProtocolError as error:
            raise ProtocolError(
                f"{self.peer}: {error} (we speak version {wire.VERSION}), at step {step}. Use the same version of "
                "tensorfork on both sides, and the address the seed printed."
            ) from error

    def _refusal(self, refused: wire.Refused, step: str) -> TensorForkError:
        text = f"{self.peer}: {refused.reason} (at step {step})"
        if refused.code == wire.VERSION_CODE:
            return ProtocolError(f"{text}; ours is version {wire.VERSION}")
        if refused.code == wire.UNAVAILABLE:
            return TransportUnavailable(text)
        if refused.code == wire.CHANGED:
            return SeedChanged(text)
        return PeerRefused(text)


class ForkChannel:
    """A lease's channel, at the fork's end."""

    def __init__(self, conversation: Conversation, lease: bytes) -> None:
        self._conversation, self._lease = conversation, lease

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.transports.base.Channel`."""
        self._conversation.say(self._lease, message, deadline)

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.transports.base.Channel`."""
        return self._conversation.hear(self._lease, deadline)


class SeedChannel:
    """A lease's channel, at the seed's end: the listener's thread puts in what the fork says."""

    BOUND = 64

    def __init__(self, listener: Listener, peer: bytes, lease: bytes) -> None:
        self._listener, self._peer, self._lease = listener, peer, lease
        self._box: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.transports.base.Channel`. Never waits: messages are few and small."""
        self._listener.say(self._peer, wire.Say(self._lease), frames=[_bounded(message)])

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


def _bounded(message: bytes) -> bytes:
    """The message, if a channel takes it: the other side hangs up on longer ones."""
    if len(message) > wire.MAX_MESSAGE:
        raise ValueError(f"a message on a channel has at most {wire.MAX_MESSAGE:,} bytes, not {len(message):,}")
    return message
