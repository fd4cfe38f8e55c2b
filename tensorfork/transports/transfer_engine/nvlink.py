"""Reads over NVLink: in batches, on threads, so that what a pull does between batches costs the link no time.

A batch is over when Mooncake's call returns. When one has failed, its GPU is waited for. So nothing stays in flight.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event

import torch

from tensorfork.errors import TransferFailed
from tensorfork.transports.checks import check_going_on
from tensorfork.transports.rate_limit import RateLimiter
from tensorfork.transports.transfer_engine.engine import Engine, set_thread_device
from tensorfork.transports.transfer_engine.reads import WINDOWS, PendingCopies, Read, in_batches

DEADLINE_INTERVAL = 0.05
"""Seconds between two checks of the deadline, of `cancel` and of the lease, while a batch is read."""
HANDLES_PER_BATCH = 32
"""Handles that are opened by one call before the pull begins: some 2 ms."""
BATCHES_PER_THREAD = 4
"""About so many batches are made for each thread, if there are so many reads, so that a pull shows progress."""
FIRST_CONTACT_THREADS = 2
"""Threads that read from a peer whose handles are not open yet: while the bytes of one thread's batch move, handles are
opened for the other's. From other peers, one thread reads: two kept the link busier (0.99 of a raw copy instead of
0.96), but slowed the seed's steps (their 99th percentile was 1.25 times idle instead of 1.15)."""

_Result = Sequence[Read] | BaseException
"""A batch that has arrived, or the error that ended a thread."""


class NvlinkReader:
    """Reads from one peer, and opens its handles beforehand.

    Args:
        engine: reads.
        address: of the peer, by `Engine.address_of`.
        gpus: the devices that are read into.
        limiter: asked before each read.
        still_leased: called now and then; raises `TransferFailed` once the seed has ended the lease.
    """

    def __init__(
        self, engine: Engine, address: str, gpus: Sequence[str], limiter: RateLimiter, still_leased: Callable[[], None]
    ) -> None:
        self._still_leased = still_leased
        self._engine, self._address, self._gpus, self._limiter = engine, address, gpus, limiter
        self._first_contact = not engine.has_contacted(address)
        self._stop_opening = Event()

    def open_handles(self, sources: Sequence[int], deadline: float, connected: Callable[[], None]) -> None:
        """Read one byte at each source address: Mooncake then opens the handle of its region, and keeps it open.

        The first read takes 10 ms, in which CUDA learns of the other GPU; `connected` is called after it. The rest is
        opened at first contact alone, and until `stop_opening`; a pull opens what is left as it reads.
        """
        for device in self._gpus:
            self._read_bytes(sources[:1], device, deadline)
        connected()
        for start in range(1, len(sources) if self._first_contact and self._gpus else 0, HANDLES_PER_BATCH):
            if self._stop_opening.is_set():
                return
            try:
                batch = sources[start : start + HANDLES_PER_BATCH]
                self._read_bytes(batch, self._gpus[-1], deadline, self._stop_opening)
            except TransferFailed:
                if self._stop_opening.is_set():  # if the peer has failed, the pull will notice
                    return
                raise

    def stop_opening(self) -> None:
        """Have `open_handles` return after the batch it is at."""
        self._stop_opening.set()

    def read(
        self, reads: Sequence[Read], copies: int, deadline: float, done: Callable[[int], None], cancel: Event
    ) -> None:
        """Make the reads of so many copies. Arguments and errors are those of `Session.pull`.

        When this returns or raises, its threads have ended and nothing is written any more.
        """
        limited = self._limiter.rate is not None
        count = FIRST_CONTACT_THREADS if self._first_contact and not limited else 1
        batches = deque(in_batches(reads, WINDOWS["nvlink"], limited, count * BATCHES_PER_THREAD))
        expected = len(batches)
        pending = PendingCopies(copies, reads, done)
        results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        stop = Event()
        threads = [
            threading.Thread(
                target=self._read_batches,
                args=(batches, deadline, results.put, stop),
                name="tensorfork-read",
                daemon=True,
            )
            for _ in range(min(expected, count))
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in range(expected):
                for read in self._next_batch(results, deadline, cancel):
                    check_going_on(deadline, cancel)
                    pending.read_arrived(read.copy)
        finally:
            stop.set()
            _join(threads)

    def _next_batch(self, results: queue.SimpleQueue[_Result], deadline: float, cancel: Event) -> Sequence[Read]:
        while True:
            check_going_on(deadline, cancel)
            self._still_leased()
            try:
                result = results.get(timeout=min(DEADLINE_INTERVAL, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def _read_batches(
        self, batches: deque[list[Read]], deadline: float, report: Callable[[_Result], None], stop: Event
    ) -> None:
        """One thread: read batches until none is left, and report each. An error is reported, and stops all threads."""
        try:
            while batches:
                try:
                    batch = batches.popleft()
                except IndexError:  # another thread took it
                    return
                set_thread_device(batch[0].device)
                while early := self._limiter.try_spend(sum(read.nbytes for read in batch)):
                    if stop.wait(min(early, DEADLINE_INTERVAL)):  # the seed may change the limit meanwhile
                        return
                if stop.is_set():
                    return
                addresses = [(read.into, read.source, read.nbytes) for read in batch]
                self._engine.read_batch(self._address, addresses, batch[0].device, deadline, stop)
                report(batch)
        except BaseException as error:  # raised by the thread that waits for the batch
            report(error)
            stop.set()

    def _read_bytes(self, sources: Sequence[int], device: str, deadline: float, stop: Event | None = None) -> None:
        set_thread_device(device)
        scratch = torch.empty(HANDLES_PER_BATCH, dtype=torch.uint8, device=device)
        batch = [(scratch.data_ptr() + i, source, 1) for i, source in enumerate(sources)]
        if batch:
            self._engine.read_batch(self._address, batch, device, deadline, stop)


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait until all threads that were started have ended. An interrupt during that is raised afterwards."""
    interrupt: BaseException | None = None
    while running := [thread for thread in threads if thread.ident is not None and thread.is_alive()]:
        try:
            running[0].join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
