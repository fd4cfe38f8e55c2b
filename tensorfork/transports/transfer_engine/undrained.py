"""Memory that Mooncake may still be writing after a pull has failed. It has no cancel.

What a failed pull leaves under way is handed over to a thread here, which asks until each read is over. Until then the
memory is kept alive (by its regions' owners) and registered, and no transfer of this transport begins that would write
to it. Over TCP, Mooncake gives a silent peer up after 30 s by default, once for each round of what it had queued.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define

from tensorfork.errors import TransferFailed
from tensorfork.transports.transfer_engine.engine import Outcome

log = logging.getLogger("tensorfork")

POLL = 0.05

Stretch = tuple[int, int]
"""An address, and bytes from there."""


@define(eq=False)
class InFlightRead:
    """A read that is under way into a stretch of our memory. `number` is the engine's, None while nobody may ask."""

    copy: int
    address: int
    nbytes: int
    number: int | None = None

    def ask(self, outcome: Callable[[int], Outcome]) -> Outcome:
        """What became of it. An engine must not be asked again about what is over; so, should this be interrupted, the
        read counts as under way for ever.
        """
        number, self.number = self.number, None
        if number is None:
            return Outcome.RUNNING
        found = outcome(number)
        if found is Outcome.RUNNING:
            self.number = number
        return found


@define(eq=False)
class _PendingReads:
    flights: list[InFlightRead]
    outcome: Callable[[int], Outcome]
    over: Callable[[], None]
    keep: Any


class UndrainedReads:
    """What may still be written, and the thread that waits for it. One for the process: `undrained_reads`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Know of nothing: in a child of `os.fork()`, nothing is under way."""
        self._wards: list[_PendingReads] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(
        self, flights: Sequence[InFlightRead], outcome: Callable[[int], Outcome], over: Callable[[], None], keep: Any
    ) -> None:
        """Watch over reads until all are over; then call `over`, and let go of `keep`."""
        with self._changed:
            self._wards.append(_PendingReads(list(flights), outcome, over, keep))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="tensorfork-drain", daemon=True)
                self._thread.start()

    def stretches(self) -> list[Stretch]:
        """What may still be written."""
        with self._changed:
            return [(flight.address, flight.nbytes) for ward in self._wards for flight in ward.flights]

    def wait(self, stretches: Sequence[Stretch], deadline: float, cancelled: Callable[[], bool]) -> None:
        """Wait until nothing may be written to these any more; raises `TransferFailed` at the deadline."""
        while self._overlaps(stretches):
            if cancelled():
                raise TransferFailed("the transfer was cancelled")
            if time.monotonic() >= deadline:
                raise TransferFailed("an earlier transfer that failed may still be writing to this memory; try later")
            with self._changed:
                self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))

    def _overlaps(self, stretches: Sequence[Stretch]) -> bool:
        held = self.stretches()
        return bool(held) and any(
            address < start + size and start < address + nbytes for address, nbytes in stretches for start, size in held
        )

    def _watch(self) -> None:
        while True:
            with self._changed:
                wards = list(self._wards)
            for ward in wards:
                self._look(ward)
            with self._changed:
                self._wards = [ward for ward in self._wards if ward.flights]
                self._changed.notify_all()
                if not self._wards:
                    self._thread = None
                    return
            time.sleep(POLL)

    def _look(self, ward: _PendingReads) -> None:
        try:
            left = [flight for flight in ward.flights if flight.ask(ward.outcome) is Outcome.RUNNING]
        except TransferFailed:
            return  # the process is ending
        if not left:
            ward.over()
            log.info("a transfer that failed has stopped writing")
        with self._changed:
            ward.flights = left


undrained_reads = UndrainedReads()

os.register_at_fork(after_in_child=undrained_reads.reset)
