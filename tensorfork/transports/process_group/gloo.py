"""A group of two over gloo, between CPUs, through TCP.

A batch is a broadcast from the seed, which for two is a send and a receive: torch can be asked whether a broadcast has
ended, and waits for one in a thread of its own. The seed copies a batch into a bucket and sends it from there: a thread
of gloo's would end the process at an address that is not mapped any more. Memory that is stable is sent in place.

Gloo has no abort. It has a wait that times out, which closes the connection. Nothing is sent or written after that. But
gloo does not tell a thread that waits for a message of which some bytes have moved already: that thread, which is
torch's, waits until the message's own timeout.
"""

import ctypes
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter import ending
from tensorfork.interpreter.environment import Changes, environment
from tensorfork.interpreter.limits import require_threads
from tensorfork.memory import cuda, host_reads, huge_pages
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.transports.process_group.batches import ByteRange
from tensorfork.transports.process_group.pair_group import (
    FORK,
    MAX_IN_FLIGHT,
    SEED,
    PairGroup,
    check_handshake,
    handshake_message,
    new_stream,
)
from tensorfork.transports.process_group.region_tensors import RegionTensors, scatter
from tensorfork.transports.process_group.rendezvous import time_left

WAIT_SLICES = {SEED: datetime.timedelta(milliseconds=50), FORK: datetime.timedelta(milliseconds=5)}
"""Of one wait; between two, `check` is called. The fork's is short, as it receives the seed's messages in between."""
PROBE_INTERVAL = 0.05
"""Seconds between two checks that the connection is open; each uses some memory until the group is destroyed."""

_closed_groups: list[tuple[Any, list[Any]]] = []
"""Closed groups, each with the operations that its threads still wait for: destroying a group waits for those."""
_closed_lock = threading.Lock()


def gloo_environment() -> Changes:
    """What torch must read when it constructs one of gloo's devices: that connections are made at once.

    That is torch's default, so nothing is to be changed unless the variable is set.
    """
    return {"TORCH_GLOO_LAZY_INIT": "0"} if "TORCH_GLOO_LAZY_INIT" in os.environ else {}


class GlooGroup(PairGroup):
    """Between the memory of two CPUs; what is on a GPU is staged through pinned buckets."""

    def __init__(
        self, store: Any, rank: int, regions: RegionTensors, device: str, bucket: int, address: str, deadline: float
    ) -> None:
        super().__init__(rank, regions, bucket)
        from torch.distributed import ProcessGroupGloo

        _destroy_finished()
        require_threads(MAX_IN_FLIGHT)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._threads = time_left(deadline), MAX_IN_FLIGHT
        try:
            with environment(gloo_environment()):
                options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        except RuntimeError as error:
            raise TransportUnavailable(f"gloo cannot listen at {address}: {error}. Check the interface.") from error
        self._stream = new_stream(torch.device(device)) if device != "cpu" else None
        self._sends_in_place = self._stream is None and regions.stable
        self._in_flight: list[Any] = []
        self._group = ProcessGroupGloo(store, rank, 2, options)

    def start(self, ranges: Sequence[ByteRange], packed: bool, deadline: float) -> Any:
        """See `PairGroup.start`."""
        if not packed and (self.rank == FORK or self._sends_in_place):
            return [self._broadcast(self._regions.view(one), deadline) for one in ranges], (), None
        sizes = [nbytes for _, _, nbytes in ranges]
        bucket = self._next_bucket(sum(sizes), self._allocate)
        if self.rank == FORK:
            return [self._broadcast(bucket, deadline)], ranges, bucket
        self._read(ranges, bucket)
        messages = [bucket] if packed else bucket.split(sizes)
        return [self._broadcast(message, deadline) for message in messages], (), bucket

    def finish(self, operation: Any, check: Callable[[], object]) -> None:
        """See `PairGroup.finish`."""
        works, unpack_into, bucket = operation
        next_probe = time.monotonic() + PROBE_INTERVAL
        for work in works:
            while not self._wait_slice(work):
                check()
                if time.monotonic() >= next_probe:
                    self._check_connection()
                    next_probe = time.monotonic() + PROBE_INTERVAL
            self._in_flight.remove(work)
        if self.aborted:
            raise TransferFailed("the transfer was aborted")
        if unpack_into:
            self._write(unpack_into, bucket)

    def abort(self) -> None:
        """See `PairGroup.abort`."""
        group, self.aborted = self._group, True
        if group is not None:
            try:
                self._recv_never_sent(group).wait(time_left(0.0))
            except RuntimeError:
                return  # it timed out, which closes the connection

    def has_stopped(self, operation: Any) -> bool:
        """See `PairGroup.has_stopped`. The connection was closed under gloo's own lock."""
        return True

    def handshake(self, deadline: float) -> None:
        """See `PairGroup.handshake`."""
        message = handshake_message(self.rank)
        work = self._broadcast(message, deadline)
        while not self._wait_slice(work):
            if time.monotonic() >= deadline:
                raise TransferFailed("the first message over gloo did not arrive")
        self._in_flight.remove(work)
        check_handshake(message)

    def close(self, idle: bool = False) -> None:
        """See `PairGroup.close`."""
        group = self._group
        super().close(idle)
        if group is not None:
            with _closed_lock:
                _closed_groups.append((group, self._in_flight))
        del group
        _destroy_finished()

    def wait_for_current_stream(self) -> None:
        """See `PairGroup.wait_for_current_stream`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _broadcast(self, tensor: torch.Tensor, deadline: float) -> Any:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = SEED
        options.timeout = time_left(deadline)
        work = self._group.broadcast([tensor], options)
        self._in_flight.append(work)
        return work

    def _wait_slice(self, work: Any) -> bool:
        """Wait for a moment; whether the operation has ended. Raises RuntimeError, torch's, if it failed."""
        try:
            work.wait(WAIT_SLICES[self.rank])
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()
        return True

    def _check_connection(self) -> None:
        """Raise RuntimeError if the connection is closed."""
        self._recv_never_sent(self._group)

    def _recv_never_sent(self, group: Any) -> Any:
        """Start to receive a message that the other side never sends."""
        return group.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], 1 - self.rank, 0)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self._stream is None:
            return huge_pages.empty(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _read(self, ranges: Sequence[ByteRange], bucket: torch.Tensor) -> None:
        """Copy ranges of our memory into a bucket. Raises `UnreadableMemory` for what is not mapped any more."""
        spans = self._regions.spans(ranges)
        if self._stream is None:
            host_reads.read(spans, bucket.data_ptr())
            return
        starts = accumulate((nbytes for _, nbytes in spans), initial=bucket.data_ptr())
        try:
            cuda.copy_to_host(self._stream, [(to, *span) for to, span in zip(starts, spans, strict=False)])
        except cuda.DriverError as error:
            raise UnreadableMemory(f"GPU memory cannot be read any more: {error}") from error
        finally:  # also of what was enqueued before an error
            self._stream.synchronize()

    def _write(self, ranges: Sequence[ByteRange], bucket: torch.Tensor) -> None:
        """Copy the content of a bucket to ranges of our memory."""
        if self._stream is None:
            scatter(self._regions, ranges, bucket)
            return
        spans = self._regions.spans(ranges)
        starts = accumulate((nbytes for _, nbytes in spans), initial=bucket.data_ptr())
        copies = [(to, start, nbytes) for (to, nbytes), start in zip(spans, starts, strict=False)]
        try:
            cuda.copy_to_device(self._stream, copies)
        except cuda.DriverError as error:
            raise TransferFailed(f"our GPU memory cannot be written any more: {error}") from error
        finally:
            self._stream.synchronize()


def _destroy_finished() -> None:
    """Destroy the closed groups whose threads wait for nothing any more."""
    with _closed_lock:
        waiting = [(group, works) for group, works in _closed_groups if not all(work.is_completed() for work in works)]
        before, _closed_groups[:] = _closed_groups[:], waiting
    del before, waiting  # destroys the others, without the lock


def _leak_at_exit() -> None:
    """Leak the closed groups, so that a process which ends does not wait for their threads."""
    for group, _ in _closed_groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


ending.after_exit(_leak_at_exit)
