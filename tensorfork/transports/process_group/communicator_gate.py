"""When communicators of NCCL's are made and taken down in this process: not both at a time."""

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tensorfork.errors import TransferFailed
from tensorfork.transports.process_group.tasks import POLL, BackgroundTask

EXIT_WAIT = 5.0
"""Seconds that a process which ends waits for groups that are being taken down."""
LEASE_WAIT = 5.0
"""Seconds for which leases wait for the one whose turn it is: a fork that was stopped must not stop others."""


class CommunicatorGate:
    """Seen with torch 2.11: a process that made one communicator while another was aborted, or its group let go of,
    ended with a segmentation fault; so did one that made two at a time, the two ends of one lease. So a making waits
    for those, and leases take turns. The lanes of one lease are made together, as the other side's order is not known.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._turns: list[tuple[object, float]] = []  # whose, and since when
        self._ending = self._aborting = self._waiting = 0

    @contextmanager
    def making(self, lease: object, until: float) -> Iterator[None]:
        """Round the making of one, of a lease that the object stands for. Waits for a group that is taken down, which
        takes half a second, and, a while, for other leases. Raises `TransferFailed` past `until`.
        """
        begun = time.monotonic()
        with self._change:
            while self._ending or self._aborting or self._is_others(lease, begun):
                if time.monotonic() >= until:
                    raise TransferFailed("earlier groups were neither made nor taken down by the deadline")
                self._change.wait(POLL)
            turn = (lease, time.monotonic())
            self._turns.append(turn)
        try:
            yield
        finally:
            with self._change:
                self._turns.remove(turn)
                self._change.notify_all()

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Round an abort: it waits for nobody, and nothing more is begun meanwhile."""
        with self._change:
            self._aborting += 1
        try:
            yield
        finally:
            with self._change:
                self._aborting -= 1
                self._change.notify_all()

    def end(self, held: list[Any], stop: Callable[[Any], object] | None = None) -> None:
        """Let go of a group and what it uses, a list of things held by nothing else, on a thread of its own when nobody
        makes one. Where `stop` is given, it is called with the group before.
        """
        with self._change:
            self._waiting += 1
        BackgroundTask(lambda: self._end(held, stop), lambda _: None, "tensorfork-close")

    def settle(self) -> None:
        """Wait for that, a moment: a thread that comes back from torch when Python has ended aborts the process."""
        with self._change:
            self._change.wait_for(lambda: not self._waiting, EXIT_WAIT)

    def _is_others(self, lease: object, begun: float) -> bool:
        """Whether it is another lease's turn, and neither it nor our wait has lasted too long."""
        now = time.monotonic()
        return now < begun + LEASE_WAIT and any(
            one is not lease and now < since + LEASE_WAIT for one, since in self._turns
        )

    def _end(self, held: list[Any], stop: Callable[[Any], object] | None) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._turns and not self._ending)
            self._ending += 1
        try:
            if stop is not None:
                stop(held[0])
        finally:
            del held[0]
            held.clear()
            with self._change:
                self._ending -= 1
                self._waiting -= 1
                self._change.notify_all()


communicator_gate = CommunicatorGate()
atexit.register(communicator_gate.settle)
