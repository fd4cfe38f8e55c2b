"""The fork's side of a lease: it opens the seed's handles, and its own copy engines read."""

import ctypes
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from threading import Event

import torch
from attrs import frozen

from tensorfork.errors import LeaseEnded, PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.memory import cuda, streams
from tensorfork.memory.copy_batch import copy_batch
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import LEASE_ENDED, LEASE_POLL_SECONDS, LeaseEnd, check_bounds, check_going_on
from tensorfork.transports.cuda_ipc.handles import RemoteHandles
from tensorfork.transports.cuda_ipc.offer import CPU_CHUNK, CPU_REQUEST, RELEASED, STOP, read_offer
from tensorfork.transports.rate_limit import RateLimiter, smaller

BATCH = 1 << 30
"""Bytes of copies, or a little more, that are enqueued together and share one event: an event between two copies costs
the copy engine some 40 µs, measured on two H200."""
SMALL_BATCH = 32 << 20
"""Bytes of a batch at least. A pull of less than 8 GiB has batches of an eighth of it, so that it too reports progress;
one with a rate limit has batches of this size, or smaller ones where the limit is low."""
WINDOW = 3
"""Batches in flight on a device."""
POLL_SECONDS = 50e-6
"""Time between two polls of the events."""


class IpcSession(Session):
    """One lease. `rate_limit`, in bytes a second, is the fork's own: it obeys the seed's, too."""

    def __init__(
        self,
        offer: bytes,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        rate_limit: float | None,
    ) -> None:
        same_process, allocations = read_offer(offer, remote)
        self.fabric = "same process" if same_process else "cuda ipc"
        self._channel, self._closed = channel, False
        self._limiter = RateLimiter(lambda: smaller(rate_limit, channel.rate_limit))
        self._deadline, self._cancel = 0.0, Event()
        self._last_pull = False
        self._lease_end = LeaseEnd(channel)
        self._remote = {region.id: region for region in remote}
        self._regions = {region.id: region for region in regions}
        devices = sorted({cuda.device_index(region.device) for region in regions if region.device != "cpu"})
        self._streams = {device: streams.acquire_stream(device) for device in devices}
        self._handles = RemoteHandles(allocations)
        try:
            if len(devices) == 1 and allocations:
                self._handles.request([(id, devices[0]) for id in allocations])
        except BaseException:
            self.close(time.monotonic())
            raise

    def ready(self, deadline: float) -> None:
        """See `Session.ready`. Opening the first handle takes 10 ms, in which CUDA sets up access to the other GPU.
        Most others are opened while bytes move: each then takes longer, but the whole takes less than one after the
        other.
        """
        try:
            self._handles.wait_for_first(deadline, self._channel.check)
        except (TransferFailed, LeaseEnded) as error:
            raise TransportUnavailable(f"cuda_ipc: {error}") from error

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        for copy in copies:
            self._check(copy)
        queues: list[_CopyQueue] = []
        for device, stream in self._streams.items():
            indices = [i for i, copy in enumerate(copies) if self._device_of(copy) == device]
            stream.wait_stream(torch.cuda.current_stream(device))
            self._handles.request(dict.fromkeys((copies[i].region, device) for i in indices))
            queues.append(_CopyQueue(device, deque(indices), self._batch_size(sum(copies[i].nbytes for i in indices))))
        self._deadline, self._cancel = deadline, cancel
        in_flight: deque[_InFlightBatch] = deque()
        unread = Counter(copy.region for copy in copies)
        try:
            while queues or in_flight:
                check_going_on(deadline, cancel)
                self._lease_end.check()
                queues = [queue for queue in queues if self._enqueue(queue, copies, in_flight)]
                while in_flight and in_flight[0].event.query():
                    batch = in_flight.popleft()
                    for i in batch.copies:
                        check_going_on(deadline, cancel)
                        done(i)
                    unread.subtract(copies[i].region for i in batch.copies)
                if self._last_pull and not queues:  # before, closing handles would delay what is enqueued
                    self._handles.close_early([id for id, copies_left in unread.items() if not copies_left])
                if queues or in_flight:
                    time.sleep(POLL_SECONDS)
            for i, copy in enumerate(copies):
                if self._device_of(copy) is None:
                    self._read_from_cpu(copy, deadline, cancel)
                    done(i)
        except cuda.DriverError as error:
            raise TransferFailed(f"reading over CUDA IPC failed: {error}") from error
        finally:
            for stream in self._streams.values():  # after a failure too, nothing is written once this has returned
                stream.synchronize()

    def expect_last_pull(self) -> None:
        """See `Session.expect_last_pull`. Closing 195 handles takes 8 ms, in which the last copies run."""
        self._last_pull = True

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        if self._closed:
            return
        self._closed = True
        self._handles.close(deadline)
        while self._streams:
            streams.release_stream(self._streams.popitem()[1])
        try:
            self._channel.send(RELEASED, max(deadline, time.monotonic() + 1))  # the handles are closed
        except PeerUnreachable:
            return

    def _enqueue(self, queue: "_CopyQueue", copies: Sequence[Copy], in_flight: "deque[_InFlightBatch]") -> bool:
        """Enqueue batches as far as the window, the rate limit and the open handles allow. False when the queue is
        empty.
        """
        stream, window = self._streams[queue.device], WINDOW * len(self._streams)
        while queue.copies and len(in_flight) < window and not self._limiter.wait():
            batch = self._next_batch(queue, copies, sum(other.device == queue.device for other in in_flight))
            if not batch:
                break
            operations = []
            for i in batch:
                copy = copies[i]
                source = self._handles.address(copy.region, queue.device, self._deadline, self._check_going_on)
                source += copy.offset
                operations.append((self._regions[copy.into].address + copy.at, source, copy.nbytes))
            self._limiter.spend(sum(nbytes for _, _, nbytes in operations))
            with self._handles.paused():
                copy_batch(stream, operations)
                event = torch.cuda.Event()
                event.record(stream)
            in_flight.append(_InFlightBatch(queue.device, event, batch))
        return bool(queue.copies)

    def _check_going_on(self) -> None:
        check_going_on(self._deadline, self._cancel)

    def _next_batch(self, queue: "_CopyQueue", copies: Sequence[Copy], in_flight: int) -> list[int]:
        """Take the next copies off a device's queue that has `in_flight` batches in flight.

        A full batch whose handles are open; if there is none, what is open, but only with at most one batch in flight,
        so that the copy engine does not run dry; and with none in flight at least one copy, whose handle is waited for.
        """
        nbytes = count = 0
        for i in queue.copies:
            if nbytes >= queue.batch_size or not self._handles.is_open(copies[i].region, queue.device):
                break
            nbytes += copies[i].nbytes
            count += 1
        full = nbytes >= queue.batch_size or count == len(queue.copies)
        if not full and in_flight > 1:
            return []
        return [queue.copies.popleft() for _ in range(count if in_flight else max(1, count))]

    def _batch_size(self, nbytes: int) -> int:
        """Bytes of a batch, for a pull of `nbytes` on a device."""
        size = min(BATCH, max(SMALL_BATCH, nbytes // 8))
        return size if self._limiter.rate is None else self._limiter.piece(min(size, SMALL_BATCH))

    def _device_of(self, copy: Copy) -> int | None:
        """The ordinal of the GPU that a copy goes to; None for the CPU."""
        device = self._regions[copy.into].device
        return None if device == "cpu" else cuda.device_index(device)

    def _check(self, copy: Copy) -> None:
        check_bounds(copy, self._remote, self._regions)
        remote, ours = self._remote[copy.region], self._regions[copy.into]
        if (remote.device == "cpu") != (ours.device == "cpu"):
            raise TransportUnavailable("cuda_ipc does not move bytes between a GPU and a CPU; zeromq does")

    def _read_from_cpu(self, copy: Copy, deadline: float, cancel: Event) -> None:
        """Make a copy from one of the seed's CPU regions, over the channel."""
        for start in range(0, copy.nbytes, CPU_CHUNK):
            check_going_on(deadline, cancel)
            nbytes = min(CPU_CHUNK, copy.nbytes - start)
            while seconds := self._limiter.try_spend(nbytes):
                cancel.wait(min(seconds, LEASE_POLL_SECONDS))
                check_going_on(deadline, cancel)
            self._channel.send(CPU_REQUEST.pack(copy.region, copy.offset + start, nbytes), deadline)
            answer = self._channel.recv(deadline)
            if answer == STOP:
                raise TransferFailed(f"{LEASE_ENDED}, or cannot read its memory any more")
            if len(answer) != nbytes:
                raise TransferFailed("the seed sent another number of bytes than was requested")
            ctypes.memmove(self._regions[copy.into].address + copy.at + start, answer, nbytes)


@frozen
class _CopyQueue:
    """The copies that are still to be enqueued on a device."""

    device: int
    copies: deque[int]
    """Their indices."""
    batch_size: int
    """Bytes to be enqueued together."""


@frozen
class _InFlightBatch:
    """Copies that a device was given together, by index; `event` is recorded behind the last of them."""

    device: int
    event: "torch.cuda.Event"
    copies: Sequence[int]
