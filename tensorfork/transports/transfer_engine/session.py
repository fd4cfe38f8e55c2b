"""The fork's side of a lease: reads in a bounded window, looked at again and again until all are over."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event

import torch

from tensorfork.errors import PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import check_bounds, check_going_on
from tensorfork.transports.rate_limit import RateLimiter
from tensorfork.transports.transfer_engine.enclosing import enclosing_regions
from tensorfork.transports.transfer_engine.engine import Engine, Handshake, Outcome
from tensorfork.transports.transfer_engine.export import QUIET, OfferedRegion
from tensorfork.transports.transfer_engine.reads import BATCHES, WINDOWS, Arrivals, Read, in_batches, reads_of
from tensorfork.transports.transfer_engine.registrations import Registration
from tensorfork.transports.transfer_engine.undrained import InFlightRead, undrained_reads

log = logging.getLogger("tensorfork")

OPENING = 30.0
"""Seconds for the first byte, where the deadline is later: nobody waits minutes for a port that is closed."""
GRACE = 0.5
"""Seconds, beyond the deadline, that a failed pull waits for its reads to be over."""
PATIENCE = 2.0
"""The same within the deadline."""
LOOK = 0.05
"""Seconds between two looks at the deadline, while a batch is under way."""
HANDLES = 32
"""Handles that are opened together over nvlink, while plans are drawn up: some 2 ms."""
READERS = 2
"""Threads that read over nvlink from a peer whose handles are not open yet: while the batch of one moves, the handles
of the other's are opened. From others, one reads: two kept the link busier (0.99 of a raw copy, and not 0.96), which
the 99th percentile of the seed's steps felt (1.25 times idle, and not 1.15)."""


class EngineSession(Session):
    """One lease, read through the process's engine."""

    def __init__(
        self,
        engine: Engine,
        address: str,
        offered: dict[int, OfferedRegion],
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        *,
        piece: int,
        rate: float | None,
    ) -> None:
        self.fabric = engine.fabric
        self._engine, self._address, self._channel = engine, address, channel
        self._offered = offered
        self._remote = {region.id: region for region in remote}
        self._regions = {region.id: region for region in regions}
        self._gpus = sorted({region.device for region in regions} - {"cpu"})
        self._window, self._rate, self._piece = WINDOWS[engine.fabric], rate, piece
        self._holding: Registration | None = None
        self._ready = self._closed = self._unquiet = False
        self._meeting: Handshake | None = None
        self._mapped = Event()
        self._new = not engine.knows(address)

    def start(self, deadline: float) -> None:
        """Register what is to be written, where the fabric needs that, and read a byte to see that it works; over
        nvlink, begin to.

        Raises `TransportUnavailable`, and leaves nothing registered, where it does not.
        """
        soon = min(deadline, time.monotonic() + OPENING)
        with self._opening(deadline):
            if self.fabric == "rdma":
                self._holding = self._engine.spans.hold(list(self._regions.values()), deadline)
            if self.fabric == "nvlink":
                self._meeting = self._engine.meet(lambda met: self._map(soon, met))
                return
            for remote in {region.device: region for region in self._remote.values() if region.nbytes}.values():
                for device in sorted({region.device for region in self._regions.values()}):
                    source = self._offered[remote.id].address
                    self._meet(source, device, soon)

    def ready(self, deadline: float) -> None:
        """See `Session.ready`."""
        if self._meeting is not None and not self._ready:
            self._ready = True
            with self._opening(deadline):
                self._meeting.wait(min(deadline, time.monotonic() + OPENING))

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        check_going_on(deadline, cancel)
        self.ready(deadline)
        for copy in copies:
            check_bounds(copy, self._remote, self._regions)
        targets = [(self._regions[copy.into].address + copy.at, copy.nbytes) for copy in copies]
        undrained_reads.wait(targets, deadline, cancel.is_set)
        check_going_on(deadline, cancel)
        self._engine.settle(self._gpus)  # nothing of this process may still be using what is written now
        if self.fabric == "nvlink":
            self._mapped.set()
            self._run_batches(copies, deadline, done, cancel)
            return
        flying: deque[InFlightRead] = deque()
        try:
            self._run(copies, flying, deadline, done, cancel)
        except BaseException as error:
            left = self._drain(flying, deadline)
            if isinstance(error, TransferFailed):
                raise TransferFailed(str(error), undrained=[(one.address, one.nbytes) for one in left]) from error
            raise

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._meeting is not None:
                self._mapped.set()
                now = time.monotonic()
                self._meeting.end(min(max(deadline, now + GRACE), now + PATIENCE))
        except Exception as error:  # whoever closes does not wait for this any more
            log.info("what was begun over nvlink failed: %s", error)
            self._unquiet = self._engine.broken
        finally:
            if self._holding is not None:
                self._holding.release()
            if not self._unquiet:
                with suppress(PeerUnreachable):  # a seed that is gone needs not be told
                    self._channel.send(QUIET, max(deadline, time.monotonic() + 0.2))

    @contextmanager
    def _opening(self, deadline: float) -> Iterator[None]:
        """Inside, a failure closes the session; one to transfer means that this transport does not work here."""
        try:
            yield
        except BaseException as error:
            self._unquiet = self._engine.broken
            self.close(deadline)
            if isinstance(error, TransferFailed):
                raise TransportUnavailable(f"transfer_engine over {self.fabric} does not work here: {error}") from error
            raise

    def _run(
        self,
        copies: Sequence[Copy],
        flying: deque[InFlightRead],
        deadline: float,
        done: Callable[[int], None],
        cancel: Event,
    ) -> None:
        limiter = RateLimiter(self._rate)
        jobs = deque(self._jobs(copies))
        arrivals = Arrivals(len(copies), jobs, done)
        under_way = 0
        while jobs or flying:
            check_going_on(deadline, cancel)
            arrived, failed = self._over(flying)
            under_way -= sum(flight.nbytes for flight in arrived)
            while jobs and not failed and len(flying) < self._window.count and under_way < self._window.nbytes:
                now = time.monotonic()
                if limiter.wait(now) or now >= deadline:
                    break
                job = jobs.popleft()
                under_way += job.nbytes
                limiter.spend(job.nbytes, now)
                self._begin(job, flying, deadline)
            if arrived and self.fabric == "tcp":  # its copies to GPUs may still be on their way when it calls them done
                self._engine.settle(self._gpus)
            for flight in arrived:
                check_going_on(deadline, cancel)
                arrivals.count(flight.copy)
            if failed:
                raise TransferFailed(
                    f"reading from {self._address} failed over {self.fabric}: its process died or is stopped, its "
                    "memory is not registered any more, or the engine's ports are closed (MC_LOG_LEVEL=INFO tells more)"
                )
            if flying and not arrived:
                cancel.wait(self._window.pause)
            elif not flying and jobs:
                cancel.wait(min(0.1, max(self._window.pause, limiter.wait(time.monotonic()))))

    def _run_batches(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """Over nvlink. Threads read one batch after another, so that what `done` does costs the link no time. Nothing
        of it flies: a batch is over when the call is, and when one has failed, its GPU is waited for.
        """
        jobs = self._jobs(copies)
        threads = READERS if self._new and not self._rate else 1
        batches = deque(in_batches(jobs, self._window, self._rate, threads * BATCHES))
        count = len(batches)
        arrivals = Arrivals(len(copies), jobs, done)
        over: queue.SimpleQueue[Sequence[Read] | BaseException] = queue.SimpleQueue()
        enough = Event()
        readers = [
            threading.Thread(
                target=self._read_batches,
                args=(batches, deadline, over.put, enough),
                name="tensorfork-read",
                daemon=True,
            )
            for _ in range(min(count, threads))
        ]
        try:
            for reader in readers:
                reader.start()
            for _ in range(count):
                for job in self._next(over, deadline, cancel):
                    check_going_on(deadline, cancel)
                    arrivals.count(job.copy)
        finally:
            enough.set()
            _join(readers)

    def _read_batches(
        self,
        batches: deque[list[Read]],
        deadline: float,
        say: Callable[[Sequence[Read] | BaseException], None],
        enough: Event,
    ) -> None:
        """On its thread: takes batches, and says each that has arrived, or why one has not."""
        limiter = RateLimiter(self._rate)
        try:
            while batches:
                try:
                    batch = batches.popleft()
                except IndexError:  # another thread has it
                    return
                _on_our_device(batch[0].device)
                while early := limiter.wait(time.monotonic()):
                    if enough.wait(early):
                        return
                if enough.is_set():
                    return
                limiter.spend(sum(job.nbytes for job in batch), time.monotonic())
                stretches = [(job.into, job.source, job.nbytes) for job in batch]
                self._engine.read_all(self._address, stretches, batch[0].device, deadline, enough)
                say(batch)
        except BaseException as error:  # for whoever waits for the batch
            say(error)
            enough.set()

    def _next(
        self, over: "queue.SimpleQueue[Sequence[Read] | BaseException]", deadline: float, cancel: Event
    ) -> Sequence[Read]:
        while True:
            check_going_on(deadline, cancel)
            try:
                said = over.get(timeout=min(LOOK, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                continue
            if isinstance(said, BaseException):
                raise said
            return said

    def _jobs(self, copies: Sequence[Copy]) -> list[Read]:
        return reads_of(copies, self._regions, self._offered, self._piece)

    def _begin(self, job: Read, flying: deque[InFlightRead], deadline: float) -> None:
        flight = InFlightRead(job.copy, job.into, job.nbytes)
        flying.append(flight)  # first: an interrupt between the two must not lose sight of it
        try:
            flight.number = self._engine.read(self._address, job.into, job.source, job.nbytes, job.device, deadline)
        except TransferFailed:
            flying.pop()
            raise

    def _over(self, flying: deque[InFlightRead]) -> tuple[list[InFlightRead], bool]:
        """The reads that have arrived, and whether any has failed; both are taken out of those that fly."""
        arrived, failed = [], False
        for _ in range(len(flying)):
            outcome = flying[0].ask(self._engine.outcome)
            if outcome is Outcome.RUNNING:
                flying.rotate(-1)
            elif outcome is Outcome.DONE:
                arrived.append(flying.popleft())
            else:
                failed = True
                flying.popleft()
        return arrived, failed

    def _drain(self, flying: deque[InFlightRead], deadline: float) -> list[InFlightRead]:
        """Wait a little for reads to be over; what then is not goes into quarantine, with what keeps it alive."""
        now = time.monotonic()
        until = max(now + GRACE, min(deadline, now + PATIENCE))
        left = list(flying)
        try:
            while left and time.monotonic() < until:
                for flight in list(left):
                    if flight.ask(self._engine.outcome) is not Outcome.RUNNING:
                        left.remove(flight)
                if left:
                    time.sleep(self._window.pause)
        finally:
            if left:
                self._unquiet = True
                holding, self._holding = self._holding, None
                keep = [region.owner for region in self._regions.values()]
                undrained_reads.take(left, self._engine.outcome, holding.release if holding else _nothing, keep)
        return left

    def _map(self, deadline: float, met: Callable[[], None]) -> None:
        """Over nvlink, read a byte of each region, whose handle Mooncake then opens and keeps; the first takes 10 ms,
        while CUDA learns of the other GPU. When the pull begins, the rest are opened as they are read from.
        """
        sources = [self._offered[region.id].address for region in self._remote.values() if region.nbytes]
        for device in self._gpus:
            self._read_bytes(sources[:1], device, deadline)
        met()
        for start in range(1, len(sources) if self._new and self._gpus else 0, HANDLES):
            if self._mapped.is_set():
                return
            try:
                self._read_bytes(sources[start : start + HANDLES], self._gpus[-1], deadline, self._mapped)
            except TransferFailed:
                if self._mapped.is_set():  # whoever reads, finds out; or nobody does
                    return
                raise

    def _read_bytes(self, sources: Sequence[int], device: str, deadline: float, enough: Event | None = None) -> None:
        _on_our_device(device)
        scratch = torch.empty(HANDLES, dtype=torch.uint8, device=device)
        stretches = [(scratch.data_ptr() + i, source, 1) for i, source in enumerate(sources)]
        if stretches:
            self._engine.read_all(self._address, stretches, device, deadline, enough)

    def _meet(self, source: int, device: str, deadline: float) -> None:
        self._engine.meet(lambda met: self._try(source, device, deadline)).end(deadline)

    def _try(self, source: int, device: str, deadline: float) -> None:
        """Read one byte into memory of our own. Runs on a thread that lasts until that is over."""
        _on_our_device(device)
        scratch = torch.empty(64, dtype=torch.uint8, device=device)
        region = Region(0, scratch.data_ptr(), scratch.nbytes, device, scratch)
        holding = self._engine.spans.hold(enclosing_regions([region])[0], deadline) if self.fabric == "rdma" else None
        over = holding.release if holding else _nothing
        flight = InFlightRead(0, region.address, 1)
        outcome = Outcome.FAILED
        try:
            flight.number = self._engine.read(self._address, region.address, source, 1, device, deadline)
            outcome = Outcome.RUNNING
            while outcome is Outcome.RUNNING and time.monotonic() < deadline:
                outcome = flight.ask(self._engine.outcome)
                time.sleep(self._window.pause)
        finally:
            if outcome is Outcome.RUNNING:
                undrained_reads.take([flight], self._engine.outcome, over, scratch)
            else:
                over()
        if outcome is not Outcome.DONE:
            raise TransferFailed(f"the first byte from {self._address} did not come")


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait until all that were started have ended, whatever interrupts that; the interrupt comes afterwards."""
    interrupt: BaseException | None = None
    while running := [thread for thread in threads if thread.ident is not None and thread.is_alive()]:
        try:
            running[0].join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _on_our_device(device: str) -> None:
    """For the rest of this thread. At its end, Mooncake returns to what was the thread's device, and makes a context
    there.
    """
    if device != "cpu":
        torch.cuda.set_device(device)


def _nothing() -> None:
    pass
