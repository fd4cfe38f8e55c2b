"""What the two sides of a lease say to one another on its channel, in msgpack.

The fork says ``join, pairs, ctas, address`` and ``parcels, last, page``; the seed ``ready`` and ``joined``, ``sent,
number``, and ``failed, reason``. ``sent`` says how many of a pull's parcels, counted from its first, have left whole,
by operations that nothing had aborted when they ended. It comes now and then, and at last for all of them.
"""

import time
from collections.abc import Callable
from typing import Any

import msgpack
from attrs import define

from tensorfork.errors import PeerUnreachable, ProtocolError
from tensorfork.transports.base import Channel

SLICE = 0.2
"""Seconds of one wait on the channel; between two, whoever waits looks up."""
MAX_PAIRS = 256


@define
class MessageChannel:
    """A channel, and the format of what is said on it."""

    channel: Channel

    def say(self, *words: Any, until: float) -> None:
        """Send."""
        self.channel.send(msgpack.packb(words), until)

    def hear(self, until: float, look: Callable[[], object]) -> list[Any]:
        """The next message. `look` is called now and then, and may raise.

        Raises `PeerUnreachable` at the deadline and when the other side is gone, `ProtocolError` for nonsense.
        """
        while True:
            look()
            words = self.overhear(min(until, time.monotonic() + SLICE))
            if words is not None:
                return words
            if time.monotonic() >= until:
                raise PeerUnreachable("the other side said nothing by the deadline")

    def overhear(self, until: float) -> list[Any] | None:
        """The next message if it comes by then; where that is past, if it is here. Raises `PeerUnreachable` if the
        other side is gone, which only a wait can tell.
        """
        try:
            message = self.channel.recv(until)
        except PeerUnreachable:
            if time.monotonic() < until:  # it did not wait so long: there is nobody
                raise
            return None
        try:
            words = msgpack.unpackb(message, strict_map_key=True)
        except Exception as error:  # msgpack has no common base for what it raises on bad bytes
            raise ProtocolError(f"what came on the channel is not msgpack: {error}") from error
        if not isinstance(words, list) or not words or not isinstance(words[0], str):
            raise ProtocolError("what came on the channel is not one of our messages")
        return words
