"""Reads over RDMA and TCP: a bounded window of them in flight, polled until all are over."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event

import torch

from tensorfork.errors import TransferFailed
from tensorfork.regions import Region
from tensorfork.transports.checks import check_going_on
from tensorfork.transports.rate_limit import RateLimiter
from tensorfork.transports.transfer_engine.enclosing import enclosing_regions
from tensorfork.transports.transfer_engine.engine import Engine, ReadStatus, set_thread_device
from tensorfork.transports.transfer_engine.reads import WINDOWS, PendingCopies, Read
from tensorfork.transports.transfer_engine.undrained import InFlightRead, undrained_reads


class WindowedReader:
    """Reads from one peer.

    Args:
        engine: reads.
        address: of the peer, by `Engine.address_of`.
        gpus: the GPUs that are read into.
        limiter: asked before each read.
        still_leased: called now and then; raises `TransferFailed` once the seed has ended the lease.
    """

    def __init__(
        self, engine: Engine, address: str, gpus: Sequence[str], limiter: RateLimiter, still_leased: Callable[[], None]
    ) -> None:
        self._still_leased = still_leased
        self._engine, self._address, self._gpus, self._limiter = engine, address, gpus, limiter
        self._window = WINDOWS[engine.fabric]

    def read(
        self,
        reads: Sequence[Read],
        copies: int,
        in_flight: deque[InFlightRead],
        deadline: float,
        done: Callable[[int], None],
        cancel: Event,
    ) -> None:
        """Make the reads of so many copies. Arguments and errors are those of `Session.pull`.

        `in_flight` has the reads that have started and are not over: none when this returns, but perhaps some when it
        raises. The caller must then `drain` them.
        """
        to_start = deque(reads)
        pending = PendingCopies(copies, reads, done)
        bytes_in_flight = 0
        while to_start or in_flight:
            check_going_on(deadline, cancel)
            self._still_leased()
            arrived, failed = self._poll(in_flight)
            bytes_in_flight -= sum(read.nbytes for read in arrived)
            if not failed:
                bytes_in_flight = self._fill_window(to_start, in_flight, bytes_in_flight, deadline, cancel)
            if arrived and self._engine.fabric == "tcp":  # it reports reads before their copies to GPUs have ended
                self._engine.synchronize(self._gpus)
            for read in arrived:
                check_going_on(deadline, cancel)
                pending.read_arrived(read.copy)
            if failed:
                raise TransferFailed(
                    f"reading from {self._address} failed over {self._engine.fabric}: its process died or is stopped, "
                    "its memory is not registered any more, or the engine's ports are closed (MC_LOG_LEVEL=INFO tells "
                    "more)"
                )
            if in_flight and not arrived:
                cancel.wait(self._window.poll_interval)
            elif not in_flight and to_start:
                cancel.wait(min(0.1, max(self._window.poll_interval, self._limiter.wait())))

    def _fill_window(
        self,
        to_start: deque[Read],
        in_flight: deque[InFlightRead],
        bytes_in_flight: int,
        deadline: float,
        cancel: Event,
    ) -> int:
        """Start reads until the window is full or the rate limit is reached. Returns the bytes then in flight."""
        while to_start and len(in_flight) < self._window.count and bytes_in_flight < self._window.nbytes:
            if self._limiter.wait() or time.monotonic() >= deadline:
                break
            read = to_start.popleft()
            bytes_in_flight += read.nbytes
            self._limiter.spend(read.nbytes)
            self._start(read, in_flight, deadline, cancel)
        return bytes_in_flight

    def drain(self, running: list[InFlightRead], until: float) -> None:
        """Poll reads, and remove from the list those that are over, until it is empty or the time has come."""
        while running and time.monotonic() < until:
            for read in list(running):
                if read.poll(self._engine.status) is not ReadStatus.RUNNING:
                    running.remove(read)
            if running:
                time.sleep(self._window.poll_interval)

    def _start(self, read: Read, in_flight: deque[InFlightRead], deadline: float, cancel: Event) -> None:
        started = InFlightRead(read.copy, read.into, read.nbytes)
        in_flight.append(started)  # before it starts, so that an interrupt between the two does not lose it
        try:
            started.transfer_id = self._engine.start_read(
                self._address, read.into, read.source, read.nbytes, read.device, deadline, cancel
            )
        except TransferFailed:
            in_flight.pop()
            raise

    def _poll(self, in_flight: deque[InFlightRead]) -> tuple[list[InFlightRead], bool]:
        """Remove the reads that are over. Returns those that have arrived, and whether any has failed."""
        arrived, failed = [], False
        for _ in range(len(in_flight)):
            status = in_flight[0].poll(self._engine.status)
            if status is ReadStatus.RUNNING:
                in_flight.rotate(-1)
            elif status is ReadStatus.DONE:
                arrived.append(in_flight.popleft())
            else:
                failed = True
                in_flight.popleft()
        return arrived, failed

    def probe(self, source: int, device: str, deadline: float) -> None:
        """Read one byte into new memory on a device, to see that reading works. Raises `TransferFailed` if not.

        For a thread of its own, since Mooncake may hang in the first read from a peer, and because of
        `set_thread_device`.
        """
        set_thread_device(device)
        scratch = torch.empty(64, dtype=torch.uint8, device=device)
        region = Region(0, scratch.data_ptr(), scratch.nbytes, device, scratch)
        release: Callable[[], None] | None = None
        if self._engine.fabric == "rdma":
            release = self._engine.registrations.acquire(enclosing_regions([region])[0], deadline).release
        read = InFlightRead(0, region.address, 1)
        status = ReadStatus.FAILED
        try:
            read.transfer_id = self._engine.start_read(self._address, region.address, source, 1, device, deadline)
            status = ReadStatus.RUNNING
            while status is ReadStatus.RUNNING and time.monotonic() < deadline:
                status = read.poll(self._engine.status)
                time.sleep(self._window.poll_interval)
        finally:
            if status is ReadStatus.RUNNING:
                undrained_reads.add([read], self._engine.status, release, scratch)
            elif release is not None:
                release()
        if status is not ReadStatus.DONE:
            raise TransferFailed(f"the first byte from {self._address} did not arrive")
