"""The messages between the two sides of a lease, which travel on its channel, in msgpack.

The fork sends ``join, pairs, ctas, address`` and ``parcels, last, page``, where a page is a list of batches. The seed
sends ``ready`` and ``joined``, ``sent, number``, and ``failed, reason``.

``sent`` says how many batches of a pull, counted from its first, have left whole: their operations ended, and nothing
had aborted them by then. It comes from time to time, and once more after the last batch.
"""

import time
from collections.abc import Callable
from typing import Any

import msgpack
from attrs import define

from tensorfork.errors import LeaseEnded, PeerUnreachable, ProtocolError
from tensorfork.transports.base import Channel

WAIT_SLICE = 0.2
"""Seconds of one wait on the channel; between two waits, the receiver checks whether it is to stop."""
MAX_PAIRS = 256
"""Pairs of devices that a fork may ask for, at most."""


@define
class MessageChannel:
    """A lease's channel, with messages encoded and decoded."""

    channel: Channel

    def check(self) -> None:
        """See `Channel.check`."""
        self.channel.check()

    def send(self, *message: Any, deadline: float) -> None:
        """Send a message. Raises `PeerUnreachable` if the other side is gone."""
        self.channel.send(msgpack.packb(message), deadline)

    def recv(self, deadline: float, check: Callable[[], object]) -> list[Any]:
        """The next message. `check` is called every `WAIT_SLICE` at least, and may raise to end the wait.

        Raises `PeerUnreachable` at the deadline and when the other side is gone, `ProtocolError` for nonsense.
        """
        while True:
            check()
            message = self.try_recv(min(deadline, time.monotonic() + WAIT_SLICE))
            if message is not None:
                return message
            if time.monotonic() >= deadline:
                raise PeerUnreachable("the other side said nothing by the deadline")

    def try_recv(self, deadline: float) -> list[Any] | None:
        """The next message, or None if there is none by the deadline; a deadline in the past does not wait.

        Raises `PeerUnreachable` if the other side is gone, which is only noticed while waiting, and `ProtocolError` for
        nonsense.
        """
        try:
            packed = self.channel.recv(deadline)
        except LeaseEnded:
            raise
        except PeerUnreachable:
            if time.monotonic() < deadline:  # raised before the deadline: the other side is gone
                raise
            return None
        try:
            message = msgpack.unpackb(packed, strict_map_key=True)
        except Exception as error:  # msgpack has no common base for what it raises on bad bytes
            raise ProtocolError(f"what came on the channel is not msgpack: {error}") from error
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise ProtocolError("what came on the channel is not one of our messages")
        return message
