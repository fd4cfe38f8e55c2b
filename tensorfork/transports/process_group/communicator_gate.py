"""Keeps this process from creating one of NCCL's communicators while it destroys another."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tensorfork.errors import TransferFailed
from tensorfork.interpreter import ending
from tensorfork.transports.process_group.tasks import POLL_INTERVAL, BackgroundTask

EXIT_WAIT = 5.0
"""Seconds that a process which ends waits for groups that are being destroyed."""
LEASE_WAIT = 5.0
"""Seconds that leases wait for one that is creating its communicators: a stopped fork must not stop others."""


class CommunicatorGate:
    """Decides when communicators may be created and destroyed.

    Seen with torch 2.11: a process ended with a segmentation fault when it created one communicator while another was
    aborted or its group was destroyed, and when it created two at a time that were the two ends of one lease. So
    creation waits for aborts and destruction, and one lease creates at a time. The groups of one lease are created
    together, as the order on the other side is not known.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._creating: list[tuple[object, float]] = []  # leases that create a communicator, and since when
        self._destroying = self._aborting = 0
        self._pending = 0  # groups that are being destroyed, or wait for it

    @contextmanager
    def creating(self, lease: object, deadline: float) -> Iterator[None]:
        """Held while a communicator is created. `lease` is any object that stands for the lease.

        Waits for groups that are being destroyed, which takes half a second, and at most `LEASE_WAIT` for other leases.
        Raises `TransferFailed` at the deadline.
        """
        started = time.monotonic()
        with self._changed:
            while self._destroying or self._aborting or self._must_wait_for_others(lease, started):
                if time.monotonic() >= deadline:
                    raise TransferFailed("at the deadline, earlier groups were still being created or destroyed")
                self._changed.wait(POLL_INTERVAL)
            entry = (lease, time.monotonic())
            self._creating.append(entry)
        try:
            yield
        finally:
            with self._changed:
                self._creating.remove(entry)
                self._changed.notify_all()

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Held during an abort, which does not wait; no communicator's creation starts meanwhile."""
        with self._changed:
            self._aborting += 1
        try:
            yield
        finally:
            with self._changed:
                self._aborting -= 1
                self._changed.notify_all()

    def destroy(self, references: list[Any], abort: Callable[[Any], object] | None = None) -> None:
        """Destroy a group on a thread of its own, once no communicator is being created. Returns at once.

        `references` must be the only references to the group, which comes first, and to what it uses. The list is
        emptied. If `abort` is given, it is called with the group before.
        """
        with self._changed:
            self._pending += 1
        BackgroundTask(lambda: self._destroy(references, abort), lambda _: None, "tensorfork-destroy")

    def wait_until_idle(self) -> None:
        """Wait at most `EXIT_WAIT` until all groups are destroyed: a thread that returns from torch after Python has
        ended aborts the process.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, EXIT_WAIT)

    def _must_wait_for_others(self, lease: object, started: float) -> bool:
        """Whether another lease is creating a communicator, and neither that nor our wait has lasted `LEASE_WAIT`."""
        now = time.monotonic()
        return now < started + LEASE_WAIT and any(
            other is not lease and now < since + LEASE_WAIT for other, since in self._creating
        )

    def _destroy(self, references: list[Any], abort: Callable[[Any], object] | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._creating and not self._destroying)
            self._destroying += 1
        try:
            if abort is not None:
                abort(references[0])
        finally:
            del references[0]
            references.clear()
            with self._changed:
                self._destroying -= 1
                self._pending -= 1
                self._changed.notify_all()


communicator_gate = CommunicatorGate()
ending.after_exit(communicator_gate.wait_until_idle)
