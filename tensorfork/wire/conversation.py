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
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import zmq

from tensorfork.errors import (
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
    SeedChanged,
    TensorForkError,
    TransportUnavailable,
)
from tensorfork.sockets.address import Address, resolve
from tensorfork.sockets.monitor import recv_event
from tensorfork.sockets.zmq_sockets import connect, new_context, new_socket, poll_timeout
from tensorfork.wire import messages

log = logging.getLogger("tensorfork")

M = TypeVar("M")

T = TypeVar("T")

POLL_MS = 200
"""Milliseconds of one wait at most; between two, whoever listens looks whether the conversation is over."""

_WATCHED = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.CONNECT_RETRIED
    | zmq.Event.DISCONNECTED
)


class Conversation:
    """The fork's end. For one thread at a time; a lease's channel may be used from another."""

    def __init__(self, peer: str, deadline: float) -> None:
        self.peer = Address.parse(peer)
        if self.peer.port is None or self.peer.is_wildcard:
            raise ValueError(f"{peer!r} is where a seed listens, not where it is found; use what seed.address says")
        resolved = resolve(self.peer, deadline)
        self._context = new_context()
        self._socket = new_socket(self._context, zmq.DEALER, max_message=messages.MAX_REPLY, queue=0)
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

    def ask(self, request: messages.Request, expect: type[M], deadline: float, step: str) -> tuple[M, list[bytes]]:
        """Send a request and wait for its reply, and the frames behind it.

        Raises:
            PeerUnreachable: no answer by the deadline, or the peer went away; names the address and the step.
            PeerRefused, SeedChanged, TransportUnavailable: it said no.
            ProtocolError: what answers is something else.
        """
        number = next(self._numbers)
        with self._lock:
            self._put([messages.encode(request, number)], deadline, step)
            while True:
                frames = self._get(deadline, step)
                got, message = self._read(frames[0], step)
                if isinstance(message, messages.Say):
                    self._keep(message, frames)
                elif got == number and isinstance(message, messages.Refused):
                    raise self._refusal(message, step)
                elif got == number and isinstance(message, expect):
                    return message, frames[1:]
                elif got == number:
                    raise ProtocolError(f"{self.peer}: a {type(message).__name__} answered, at step {step}")
                # else the answer to a request that was given up; not ours any more

    def say(self, lease: bytes, message: bytes, deadline: float) -> None:
        """Send on a lease's channel."""
        messages.check_channel_message(message)
        with self._lock:
            self._put([messages.encode(messages.Say(lease), 0), message], deadline, "channel")

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
                    if isinstance(message, messages.Say):
                        self._keep(message, frames)
                    elif isinstance(message, messages.Refused):
                        raise self._refusal(message, "channel")

    def close(self) -> None:
        """Hang up. Whoever else is just listening is waited for; who comes later is told."""
        self._closed = True
        with self._lock:
            self._socket.disable_monitor()
            self._context.destroy(linger=200)

    def _keep(self, said: messages.Say, frames: Sequence[bytes]) -> None:
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
        ready = dict(poller.poll(min(poll_timeout(deadline), POLL_MS)))
        if self._monitor in ready:
            self._notice(recv_event(self._monitor), step)

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
            f"{messages.VERSION} of the tensorfork protocol. Check the port: it should be the one of seed.address."
        )

    def _read(self, frame: bytes, step: str) -> tuple[int, Any]:
        try:
            return messages.decode(frame, messages.REPLIES)
        except ProtocolError as error:
            raise ProtocolError(
                f"{self.peer}: {error} (we speak version {messages.VERSION}), at step {step}. Use the same version of "
                "tensorfork on both sides, and the address the seed printed."
            ) from error

    def _refusal(self, refused: messages.Refused, step: str) -> TensorForkError:
        text = f"{self.peer}: {refused.reason} (at step {step})"
        if refused.code == messages.VERSION_CODE:
            return ProtocolError(f"{text}; ours is version {messages.VERSION}")
        if refused.code == messages.UNAVAILABLE:
            return TransportUnavailable(text)
        if refused.code == messages.CHANGED:
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
