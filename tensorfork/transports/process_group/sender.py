"""Sends the batches of one pull, at the seed."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from threading import Event
from typing import Any

from tensorfork.errors import PeerUnreachable
from tensorfork.transports.process_group.batches import ByteRange
from tensorfork.transports.process_group.messages import MessageChannel
from tensorfork.transports.process_group.pair_group import MAX_IN_FLIGHT, PairGroup
from tensorfork.transports.process_group.tasks import Watchdog
from tensorfork.transports.rate_limit import Share

REPORT_INTERVAL = 0.004
"""Seconds between two reports to the fork that batches have left, at least: each costs the seed's interpreter some
0.1 ms."""


class BatchSender:
    """Sends batches, at most `MAX_IN_FLIGHT` at once, and reports to the fork how many have left whole.

    Args:
        channel: where to report.
        share: the lease's part in the seed's rate limit, asked before each batch.
        watchdog: started with the first batch; its deadline moves with each batch that starts or ends.
        ended: set when the lease ends.
        deadline: when the lease ends by itself.
        stall: seconds after which a batch that does not end is aborted.
    """

    def __init__(
        self,
        channel: MessageChannel,
        share: Share,
        watchdog: Watchdog,
        ended: Event,
        deadline: float,
        stall: float,
    ) -> None:
        self._channel, self._share, self._watchdog = channel, share, watchdog
        self._ended, self._deadline, self._stall = ended, deadline, stall
        self._in_flight: deque[tuple[PairGroup, Any]] = deque()
        self._sent = self._reported = 0
        self._next_report = 0.0

    def send(self, batches: Iterable[tuple[PairGroup, bool, Sequence[ByteRange]]]) -> None:
        """Send these batches: for each its group, whether it is packed, and its ranges.

        Raises `PeerUnreachable` when the lease ends or the fork is gone, and what `PairGroup.finish` raises. Batches in
        flight are then left to be aborted.
        """
        for group, packed, ranges in batches:
            self._wait_for_limiter(sum(nbytes for _, _, nbytes in ranges))
            if len(self._in_flight) == MAX_IN_FLIGHT:
                self._finish_oldest()
            self._in_flight.append((group, group.start(ranges, packed, self._deadline)))
            self._watchdog.start()
            self._postpone_abort()
        while self._in_flight:
            self._finish_oldest()
        if self._reported < self._sent:
            self._report()

    def _wait_for_limiter(self, nbytes: int) -> None:
        while (seconds := self._share.try_spend(nbytes)) > 0:
            if self._in_flight:  # there is time to wait for its end, and to report it
                self._finish_oldest()
            else:
                self._ended.wait(min(seconds, 0.5))
                self._postpone_abort()

    def _finish_oldest(self) -> None:
        self._postpone_abort()
        group, operation = self._in_flight.popleft()
        group.finish(operation, self._check_lease)
        self._sent += 1
        if time.monotonic() >= self._next_report:
            self._report()

    def _report(self) -> None:
        self._channel.send("sent", self._sent, deadline=self._deadline)
        self._reported, self._next_report = self._sent, time.monotonic() + REPORT_INTERVAL

    def _postpone_abort(self) -> None:
        self._check_lease()
        self._watchdog.deadline = min(self._deadline, time.monotonic() + self._stall)

    def _check_lease(self) -> None:
        check_lease(self._ended)


def check_lease(ended: Event) -> None:
    """Raise `PeerUnreachable` once the lease has ended."""
    if ended.is_set():
        raise PeerUnreachable("the lease has ended")
