"""Memory that Mooncake may still be writing to after a pull has failed. Mooncake cannot cancel a read.

A failed pull hands its unfinished reads to `undrained_reads`, whose thread polls each until it is over. Until then the
memory is kept alive (through its regions' owners) and registered, and no transfer of this transport that would write
to it begins. Over TCP, Mooncake gives up on a silent peer after 30 s by default, once for each round of reads it had
queued.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define

from tensorfork.errors import TransferFailed
from tensorfork.transports.transfer_engine.engine import ReadStatus

log = logging.getLogger("tensorfork")

POLL_INTERVAL = 0.05
"""Seconds between two polls of unfinished reads."""

MemoryRange = tuple[int, int]
"""An address, and the number of bytes from there."""


@define(eq=False)
class InFlightRead:
    """A read into our memory that has been started.

    `transfer_id` is the engine's number for it: None before there is one, during a poll, and once the read is over.
    """

    copy: int
    address: int
    nbytes: int
    transfer_id: int | None = None

    def poll(self, status: Callable[[int], ReadStatus]) -> ReadStatus:
        """The status of the read. Not to be called again once it is over.

        Asking an engine again about a read that is over crashes the process. So a poll that was interrupted is not
        repeated, and that read counts as running for ever.
        """
        transfer_id, self.transfer_id = self.transfer_id, None
        if transfer_id is None:
            return ReadStatus.RUNNING
        found = status(transfer_id)
        if found is ReadStatus.RUNNING:
            self.transfer_id = transfer_id
        return found


@define(eq=False)
class _PendingReads:
    """What one failed pull left behind."""

    reads: list[InFlightRead]
    status: Callable[[int], ReadStatus]
    on_drained: Callable[[], None] | None
    keep_alive: Any


class UndrainedReads:
    """Reads that may still write, and the thread that polls them. One for the process: `undrained_reads`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything. For the child of `os.fork()`, in which no read is in flight."""
        self._pending: list[_PendingReads] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(
        self,
        reads: Sequence[InFlightRead],
        status: Callable[[int], ReadStatus],
        on_drained: Callable[[], None] | None,
        keep_alive: Any,
    ) -> None:
        """Poll these reads until all are over; then call `on_drained`, if given, and drop `keep_alive`."""
        with self._changed:
            self._pending.append(_PendingReads(list(reads), status, on_drained, keep_alive))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tensorfork-drain", daemon=True)
                self._thread.start()

    def ranges(self) -> list[MemoryRange]:
        """The memory that may still be written."""
        with self._changed:
            return [(read.address, read.nbytes) for pending in self._pending for read in pending.reads]

    def wait(self, ranges: Sequence[MemoryRange], deadline: float, cancelled: Callable[[], bool]) -> None:
        """Wait until nothing can be written to this memory any more.

        Raises `TransferFailed` at the deadline, or when `cancelled` returns true.
        """
        while self._overlaps(ranges):
            if cancelled():
                raise TransferFailed("the transfer was cancelled")
            if time.monotonic() >= deadline:
                raise TransferFailed("an earlier transfer that failed may still be writing to this memory; try later")
            with self._changed:
                self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))

    def _overlaps(self, ranges: Sequence[MemoryRange]) -> bool:
        undrained = self.ranges()
        return bool(undrained) and any(
            address < start + size and start < address + nbytes
            for address, nbytes in ranges
            for start, size in undrained
        )

    def _run(self) -> None:
        """The thread: ends when no read is left."""
        while True:
            with self._changed:
                all_pending = list(self._pending)
            for pending in all_pending:
                self._poll(pending)
            with self._changed:
                self._pending = [pending for pending in self._pending if pending.reads]
                self._changed.notify_all()
                if not self._pending:
                    self._thread = None
                    return
            time.sleep(POLL_INTERVAL)

    def _poll(self, pending: _PendingReads) -> None:
        try:
            running = [read for read in pending.reads if read.poll(pending.status) is ReadStatus.RUNNING]
        except TransferFailed:
            return  # the process is ending
        if not running:
            if pending.on_drained is not None:
                pending.on_drained()
            log.info("a transfer that failed has stopped writing")
        with self._changed:
            pending.reads = running


undrained_reads = UndrainedReads()

os.register_at_fork(after_in_child=undrained_reads.reset)
