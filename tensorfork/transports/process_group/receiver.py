"""Receives the batches of one pull, at the fork."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from tensorfork.errors import PeerUnreachable, ProtocolError, TransferFailed
from tensorfork.regions import Copy
from tensorfork.transports.checks import check_going_on
from tensorfork.transports.process_group.batches import Batch, encode_pages
from tensorfork.transports.process_group.messages import MessageChannel
from tensorfork.transports.process_group.pair_group import MAX_IN_FLIGHT, PairGroup
from tensorfork.transports.process_group.tasks import Watchdog

RECV_INTERVAL = 0.002
"""Seconds between two checks for messages of the seed's, while batches are in flight."""
LIVENESS_INTERVAL = 0.05
"""Seconds between two such checks that wait for 1 ms: only those notice that the seed is gone."""
SPIN_SECONDS = 0.001
"""Seconds for which the last message is polled for without sleeping: to sleep and be woken takes a tenth of that."""


class BatchReceiver:
    """Asks the seed for batches and receives them, at most `MAX_IN_FLIGHT` at once.

    A batch is complete when it has arrived here and the seed has confirmed that it left whole. Both are needed: when
    the seed aborts an operation, this side cannot tell that the bytes never came.

    Attributes:
        in_flight: the batches that are being received, oldest first, each with its group and operation. After a failure
            those that may still be written to.
        callback_error: what `done` raised, or None.

    Args:
        channel: the lease's.
        watchdog: started with the first batch.
        cancel: set to end the pull.
        deadline: when the pull ends.
        done: called with the index of each copy that is complete.
    """

    def __init__(
        self,
        channel: MessageChannel,
        watchdog: Watchdog,
        cancel: threading.Event,
        deadline: float,
        done: Callable[[int], None],
    ) -> None:
        self._channel, self._watchdog, self._cancel = channel, watchdog, cancel
        self._deadline, self._done = deadline, done
        self._next_recv = time.monotonic()
        self._next_liveness_check = self._next_recv + LIVENESS_INTERVAL
        self._requested: list[Batch] = []
        self._all_requested = False
        self._missing: list[int] = []  # bytes that each copy still needs
        self._arrived = self._confirmed = self._completed = 0  # numbers of batches
        self._seed_failure = ""
        self.in_flight: deque[tuple[Batch, PairGroup, Any]] = deque()
        self.callback_error: BaseException | None = None

    def receive(self, copies: Sequence[Copy], batches: Iterable[Batch], groups: Sequence[PairGroup]) -> None:
        """Receive all batches, which hold these copies. Raises `TransferFailed`, what `done` raises, or what a group or
        the channel raises; `failure_reason` then tells why.
        """
        pages = encode_pages(batches)
        self._request(pages)
        self._missing = [copy.nbytes for copy in copies]
        for i, nbytes in enumerate(self._missing):
            if not nbytes:
                self._call_done(i)
        for group in groups:
            group.wait_for_current_stream()
        for number in count():
            full = len(self.in_flight) == MAX_IN_FLIGHT
            needed = number + (MAX_IN_FLIGHT if full else 1)  # no more than keeps the link busy
            while not self._all_requested and len(self._requested) < needed:
                self._request(pages)
            if number == len(self._requested):
                break
            if full:
                self._finish_oldest()
            batch = self._requested[number]
            group = groups[batch.group]
            operation = group.start(batch.destinations, batch.packed, self._deadline)
            self.in_flight.append((batch, group, operation))
            self._watchdog.start()
        while self.in_flight:
            self._finish_oldest()
        self._complete(len(self._requested))
        self._wait_for_confirmation()

    def check(self) -> None:
        """Raise `TransferFailed` if the pull is to end: cancelled, or past its deadline."""
        check_going_on(self._deadline, self._cancel)
        if self._watchdog.reason:
            raise TransferFailed(self._watchdog.reason)

    def failure_reason(self, error: BaseException) -> str:
        """Why the pull failed with this error: what ended it here, what the seed says, or what torch raised."""
        if self._watchdog.reason or self._seed_failure or not isinstance(error, RuntimeError):
            return self._watchdog.reason or self._seed_failure or str(error)
        first_line = str(error).splitlines()[0]
        try:
            while message := self._channel.try_recv(time.monotonic() + LIVENESS_INTERVAL):
                self._handle(message)
        except (TransferFailed, ProtocolError, PeerUnreachable) as cause:
            return f"{cause} ({first_line})"
        return f"the connection broke: {first_line}"

    def _request(self, pages: Iterator[tuple[bytes, list[Batch]]]) -> None:
        """Ask for another page of batches; an empty page says that there are no more."""
        page, batches = next(pages, (b"", []))
        self._all_requested = not batches
        self._channel.send("parcels", self._all_requested, page, deadline=self._deadline)
        self._requested += batches

    def _finish_oldest(self) -> None:
        _, group, operation = self.in_flight[0]
        group.finish(operation, self._poll)
        self.in_flight.popleft()
        self._arrived += 1
        self._poll()  # `finish` does not call it if there was nothing to wait for
        self._complete(1)  # a second one for this batch, so as to catch up

    def _poll(self) -> None:
        """Raise if the pull is to end; handle the seed's messages without waiting; complete one batch.

        No more than one, as the next batch is not started while `done` runs.
        """
        self.check()
        now = time.monotonic()
        if now >= self._next_recv:
            deadline = now
            if now >= self._next_liveness_check:
                self._next_liveness_check, deadline = now + LIVENESS_INTERVAL, now + 0.001
            while message := self._channel.try_recv(deadline):
                self._handle(message)
            self._next_recv = time.monotonic() + RECV_INTERVAL
        self._complete(1)

    def _wait_for_confirmation(self) -> None:
        """Wait until the seed has confirmed all batches, and complete them."""
        spin_end = time.monotonic() + SPIN_SECONDS
        while self._completed < len(self._requested):
            if time.monotonic() < spin_end:
                message = self._channel.try_recv(0.0)
            else:
                message = self._channel.recv(self._deadline, self.check)
            if message:
                self._handle(message)
                self._complete(len(self._requested))

    def _complete(self, limit: int) -> None:
        """Complete the next batches that have arrived and are confirmed, `limit` at most; call `done` for the copies
        that are whole then.
        """
        end = min(self._completed + limit, self._arrived, self._confirmed)
        for batch in self._requested[self._completed : end]:
            self._completed += 1
            for i, (_, _, nbytes) in zip(batch.copies, batch.destinations, strict=True):
                self._missing[i] -= nbytes
                if not self._missing[i]:
                    self._call_done(i)

    def _call_done(self, i: int) -> None:
        try:
            self._done(i)
        except BaseException as error:
            self.callback_error = error
            raise
        if self._cancel.is_set():
            raise TransferFailed("the transfer was cancelled")

    def _handle(self, message: Sequence[Any]) -> None:
        match message:
            case ["sent", int(number)] if self._confirmed < number <= len(self._requested):
                self._confirmed = number
            case ["failed", str(reason)]:
                self._seed_failure = f"the seed says: {reason}"
                raise TransferFailed(self._seed_failure)
            case _:
                raise ProtocolError(f"the seed said {str(message)[:40]} where nothing of the kind is expected")
