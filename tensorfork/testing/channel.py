"""A lease's channel without a conversation between two processes."""

import queue
import time
from collections.abc import Callable

from tensorfork import LeaseEnded, PeerUnreachable
from tensorfork.sockets.address import Address


class QueueChannel:
    """One end of a lease's channel; a `tensorfork.Channel`.

    `send` passes each message to the function given here or to `connect`, as a rule the other end's `deliver`. That
    puts it into a queue, from which `recv` takes it.

    Attributes:
        rate_limit: see `tensorfork.Channel`; None unless it is set.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.rate_limit: float | None = None
        self._send = send
        self.seed = Address("127.0.0.1", None)
        """See `tensorfork.Channel`; whoever grants the lease knows it."""
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = False

    def connect(self, send: Callable[[bytes], None]) -> None:
        """From now on, pass messages to this function."""
        self._send = send

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.Channel`."""
        if len(message) > 1 << 20:
            raise ValueError("a message on a channel has at most 1 MiB")
        try:
            self._send(bytes(message))
        except OSError as error:
            raise PeerUnreachable(f"the other side is gone: {error}") from error

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.Channel`."""
        try:
            message = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnreachable("nothing came on the channel by the deadline") from None
        if message is None:
            self._queue.put(None)
            raise PeerUnreachable("the lease has ended")
        return message

    def check(self) -> None:
        """See `tensorfork.Channel`."""
        if self._ended:
            raise LeaseEnded("the lease has ended")

    def deliver(self, message: bytes) -> None:
        """Hand this end a message from the other one."""
        self._queue.put(message)

    def end(self) -> None:
        """End the lease: `recv` raises once all delivered messages have been received, and `check` at once."""
        self._ended = True
        self._queue.put(None)
