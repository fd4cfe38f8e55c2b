"""The seed's end of its conversations with forks, on its port.

`Listener` decodes requests and hands each to the seed, which replies at once or later. It does not know what the
messages mean. The fork's end is `tensorfork.wire.conversation`.
"""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

from tensorfork.errors import LeaseEnded, PeerUnreachable, ProtocolError
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import Port
from tensorfork.wire import messages

SendReply = Callable[..., None]
"""Sends the reply to one request: takes the reply, and the frames behind it. Called once, from any thread."""

log = logging.getLogger("tensorfork")


class Listener:
    """The seed's end. The port's thread calls the two functions that it is given; neither may block.

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
        keep: Callable[[bytes], bool] = lambda peer: False,
    ) -> None:
        """Bind to the address. Raises `OSError` when it is taken, or not one of this host; `ResourceExhausted`."""
        self._on_request = on_request
        self.port = Port(address, self._on_message, on_gone, stall, keep)
        self.address = self.port.address

    def start(self, tick: Callable[[], float | None]) -> None:
        """See `Port.start`."""
        self.port.start(tick)

    def send(self, peer: bytes, message: messages.Reply, number: int = 0, frames: Sequence[bytes] = ()) -> None:
        """Queue a message for a fork, from any thread. It is dropped if the fork is gone or does not read."""
        self.port.send(peer, [messages.encode(message, number), *frames])

    def end(self, peer: bytes) -> None:
        """See `Port.end`."""
        self.port.end(peer)

    def close(self, deadline: float) -> None:
        """See `Port.close`."""
        self.port.close(deadline)

    def _on_message(self, peer: bytes, frames: Sequence[bytes]) -> None:
        if len(frames) <= 2:
            self._dispatch(peer, *frames)

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


class SeedChannel:
    """The seed's end of a lease's channel; a `tensorfork.transports.base.Channel`."""

    MAX_UNREAD = 64
    """Messages of the fork's that may wait to be read."""
    MAX_UNREAD_BYTES = 2 << 20
    """Bytes of these: a few of the longest."""
    SHARE, MAX_UNREAD_IN_ALL = 576 << 10, 16 << 20
    """Bytes of these that may wait whatever waits on others; and on the channels of all leases together."""
    rate_limit = None
    """It is the fork's end that is told one."""

    def __init__(self, listener: Listener, peer: bytes, lease: bytes) -> None:
        self._listener, self._peer, self._lease = listener, peer, lease
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = False
        self._delivered = self._taken = 0
        """Bytes: the first is the listener's thread's to change, the second the reader's."""

    @property
    def unread(self) -> int:
        """Bytes that wait to be read."""
        return self._delivered - self._taken

    @property
    def seed(self) -> Address:
        """See `tensorfork.transports.base.Channel`."""
        return self._listener.address

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
        self._taken += len(message)
        return message

    def check(self) -> None:
        """See `tensorfork.transports.base.Channel`."""
        if self._ended:
            raise LeaseEnded("the lease has ended")

    def deliver(self, message: bytes, in_all: Callable[[], int]) -> bool:
        """Add a message from the fork. False, without adding it, where too much would wait to be read: on this channel,
        or, where it has more than its `SHARE`, on all channels, whose bytes `in_all` gives.
        """
        unread = self.unread + len(message)
        if self._inbox.qsize() >= self.MAX_UNREAD or unread > self.MAX_UNREAD_BYTES:
            return False
        if unread > self.SHARE and in_all() + len(message) > self.MAX_UNREAD_IN_ALL:
            return False
        self._delivered += len(message)
        self._inbox.put(message)
        return True

    def end(self) -> None:
        """End the channel: `recv` raises `LeaseEnded`, in threads that wait in it too."""
        self._ended = True
        self._inbox.put(None)
