"""What a seed has said of leases unasked, until somebody reads it: bounded, since it may say anything."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tensorfork.errors import ProtocolError
from tensorfork.wire import messages

MAX_UNREAD = 8 << 20
"""Bytes that may wait to be read, of all leases. Messages are short, and read as they come."""
MAX_SHARES = 16
"""Leases of which it is remembered what their fork may read. A fork has one at a time."""
_EACH = 512
"""Bytes that a message costs beside its own."""

Unread = bytes | messages.Ended


class Inboxes:
    """Messages on the leases' channels, the ends of leases, and what forks may read. For any thread."""

    def __init__(self) -> None:
        self._inboxes: dict[bytes, queue.SimpleQueue[Unread]] = {}
        self._shares: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()
        self._unread = 0

    def put(self, message: Any, frames: Sequence[bytes]) -> bool:
        """Keep a message of the seed's, if it is one of these; False if not.

        Raises `ProtocolError` where more than `MAX_UNREAD` bytes wait already.
        """
        if isinstance(message, messages.ChangeShare):
            with self._lock:
                self._shares[message.lease] = message.share
                while len(self._shares) > MAX_SHARES:
                    self._shares.popitem(last=False)
            return True
        if not isinstance(message, messages.Say | messages.Ended):
            return False
        said = message if isinstance(message, messages.Ended) else b"".join(frames[1:])
        with self._lock:
            self._unread += _EACH + sum(map(len, frames[1:] if isinstance(said, bytes) else frames))
            if self._unread > MAX_UNREAD:
                raise ProtocolError(f"more than {MAX_UNREAD:,} bytes came that nobody had asked for")
            self._inboxes.setdefault(message.lease, queue.SimpleQueue()).put(said)
        return True

    def get(self, lease: bytes) -> Unread | None:
        """The next that was said on a lease's channel; None if there is nothing. The lease's end stays."""
        inbox = self._inboxes.get(lease)
        try:
            said = None if inbox is None else inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(said, bytes):
            with self._lock:
                self._unread -= _EACH + len(said)
        elif inbox is not None and said is not None:
            inbox.put(said)
        return said

    def is_empty(self, lease: bytes) -> bool:
        """Whether nothing waits for `get`."""
        inbox = self._inboxes.get(lease)
        return inbox is None or inbox.empty()

    def share(self, lease: bytes, granted: float | None) -> float | None:
        """What a lease's fork may read now, in bytes a second; `granted` with the lease."""
        return self._shares.get(lease, granted)
