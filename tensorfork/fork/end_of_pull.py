"""What ends a pull early: the fork's cancellation, and the end of its seed."""

import math
import time
from threading import Event

from tensorfork.errors import PeerUnreachable
from tensorfork.wire.conversation import Conversation

POLL = 0.05
"""Seconds between two looks, while somebody waits for it."""


class EndOfPull(Event):
    """The event that `Session.pull` is given: set once `cancel` is, or the seed's connection is seen to be gone.

    A transport asks it all the time, so that none has to know of the conversation. For any thread.

    Attributes:
        lost: what is known of a seed that is gone.
    """

    def __init__(self, cancel: Event, conversation: Conversation) -> None:
        super().__init__()
        self._cancel, self._conversation = cancel, conversation
        self.lost: PeerUnreachable | None = None

    def is_set(self) -> bool:
        """See `threading.Event`."""
        if self.lost is None and not self._cancel.is_set():
            try:
                self._conversation.check_there("transfer")
            except PeerUnreachable as error:
                self.lost = error
        return self.lost is not None or self._cancel.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """See `threading.Event`."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and time.monotonic() < end:
            self._cancel.wait(min(POLL, max(0.0, end - time.monotonic())))
        return self.is_set()
