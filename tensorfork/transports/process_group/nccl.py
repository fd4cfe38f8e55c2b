"""A group of two over NCCL, between GPUs."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from tensorfork.errors import TransferFailed
from tensorfork.interpreter.environment import environment
from tensorfork.memory import streams
from tensorfork.transports.process_group.batches import ByteRange
from tensorfork.transports.process_group.communicator_gate import communicator_gate
from tensorfork.transports.process_group.pair_group import (
    FORK,
    HANDSHAKE,
    SEED,
    CtaLimits,
    PairGroup,
    check_handshake,
    handshake_message,
    new_stream,
)
from tensorfork.transports.process_group.region_tensors import RegionTensors
from tensorfork.transports.process_group.rendezvous import time_left
from tensorfork.transports.process_group.tasks import BackgroundTask

log = logging.getLogger("tensorfork")

ABORT_TIMEOUT = 5.0
"""Seconds that an abort is waited for; after that it goes on by itself."""
POLL_INTERVAL = 100e-6
"""Seconds between two checks whether a GPU has finished."""

ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else torch ends the process at a timeout
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # else it ends the process when its watchdog seems stuck
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # else its watchdog ends the process at any CUDA error
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_DESYNC_DEBUG": "0",  # would turn error handling on again
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # wait() is for streams here
    "TORCH_NCCL_ENABLE_TIMING": "0",
    "TORCH_NCCL_NAN_CHECK": "0",
    "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "0",  # would register the engine's memory with our communicator
}
"""What torch reads when it constructs a ProcessGroupNCCL; see docs/nccl.md."""


class NcclGroup(PairGroup):
    """Between two GPUs. Small ranges are packed on one and unpacked on the other by torch's kernels, on streams of our
    own, while the batch before is sent.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        regions: RegionTensors,
        device: str,
        bucket: int,
        ctas: CtaLimits,
        deadline: float,
    ) -> None:
        super().__init__(rank, regions, bucket)
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = time_left(deadline + 3600.0)  # never reached: `Watchdog` aborts before
        options.config.blocking = 1
        if ctas.min_ctas is not None:
            options.config.min_ctas = ctas.min_ctas
        if ctas.max_ctas is not None:
            options.config.max_ctas = ctas.max_ctas
        if ctas.cga_cluster_size is not None:
            options.config.cga_cluster_size = ctas.cga_cluster_size
        self._device = torch.device(device)
        self._pack_stream, self._unpack_stream = new_stream(self._device), new_stream(self._device)
        with torch.cuda.device(self._device), environment(ENVIRONMENT):
            self._group = ProcessGroupNCCL(store, rank, 2, options)

    def start(self, ranges: Sequence[ByteRange], packed: bool, deadline: float) -> Any:
        """See `PairGroup.start`. NCCL's own stream waits for `_pack_stream`, and `_unpack_stream` waits for NCCL's, so
        that batches overlap.
        """
        views = [self._regions.view(one) for one in ranges]
        tensors = views
        with streams.on_stream(self._pack_stream):
            if packed:
                sizes = [nbytes for _, _, nbytes in ranges]
                tensors = [bucket := self._next_bucket(sum(sizes), self._allocate)]
                if self.rank == SEED:
                    torch.cat(views, out=bucket)
            work = self._send_or_recv(tensors)
        done = torch.cuda.Event(blocking=True)
        with streams.on_stream(self._unpack_stream):
            work.wait()
            if packed and self.rank == FORK:
                torch._foreach_copy_(views, list(bucket.split(sizes)))
            done.record()
        return done, work, tensors  # the tensors keep the bucket, which may still be written to, alive

    def finish(self, operation: Any, check: Callable[[], object]) -> None:
        """See `PairGroup.finish`. The seed sleeps until the GPU has finished, and leaves the GIL to the engine.

        An aborted kernel ends as if it had done its work. `abort` sets `aborted` before it aborts, and here it is read
        after the kernel has ended: if it is not set by then, the kernel was not aborted.
        """
        done = operation[0]
        if self.rank == SEED:
            done.synchronize()
        else:
            while not done.query():
                check()
                time.sleep(POLL_INTERVAL)
        if self.aborted:
            raise TransferFailed("the communicator was aborted")

    def abort(self) -> None:
        """See `PairGroup.abort`."""
        group, aborted_before, self.aborted = self._group, self.aborted, True
        if group is None or aborted_before:
            return
        with communicator_gate.aborting():
            _abort(group)

    def has_stopped(self, operation: Any) -> bool:
        """See `PairGroup.has_stopped`."""
        try:
            return bool(operation[0].query())
        except RuntimeError:  # the device has failed, and does nothing more
            return True

    def handshake(self, deadline: float) -> None:
        """See `PairGroup.handshake`. NCCL creates its communicator here, which takes about half a second."""
        with streams.on_stream(self._pack_stream), communicator_gate.creating(self._regions, deadline):
            _load_kernels(self._device)
            message = self._allocate(len(HANDSHAKE)).copy_(handshake_message(self.rank))
            work = self._send_or_recv([message])
        done = torch.cuda.Event()
        with streams.on_stream(self._unpack_stream):
            work.wait()
            done.record()
        while not done.query():
            if self.aborted or time.monotonic() > deadline:
                raise TransferFailed("the first message over NCCL did not arrive")
            time.sleep(0.001)
        check_handshake(message.cpu())

    def wait_for_current_stream(self) -> None:
        """See `PairGroup.wait_for_current_stream`."""
        self._pack_stream.wait_stream(torch.cuda.current_stream(self._device))

    def close(self, idle: bool = False) -> None:
        """See `PairGroup.close`. The group is destroyed on another thread, and its buckets are kept until then.

        An abort takes half a second, and torch's own watchdog a moment to end. If the group is idle, the caller waits
        for neither.
        """
        if not idle:
            self.abort()
        abort = None if self.aborted else _abort_idle
        self.aborted = True
        references, self._group, self._buckets = [self._group, self._buckets], None, []
        if references[0] is not None:
            communicator_gate.destroy(references, abort)

    def _send_or_recv(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Send or receive these tensors, in one of NCCL's operations.

        Coalescing is ended even after an error: otherwise the caller's thread would stay within it.
        """
        operation = self._group.send if self.rank == SEED else self._group.recv
        self._group._start_coalescing()
        try:
            for tensor in tensors:
                operation([tensor], 1 - self.rank, 0)
        finally:
            work = self._group._end_coalescing()
        return work

    def _allocate(self, nbytes: int) -> torch.Tensor:
        with streams.on_stream(_bucket_stream(self._device)):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def warm_up_thread(regions: RegionTensors, device: str) -> None:
    """Do on this thread what CUDA and torch need half a millisecond for when a thread first uses a GPU, so that the
    first batch does not wait for it.
    """
    with streams.on_stream(_bucket_stream(torch.device(device))):
        regions.view(regions.no_bytes_on(device))
        torch.cuda.Event(blocking=True).record()


def _abort(group: Any) -> None:
    """Abort a group; return when that is done, has failed, or has taken `ABORT_TIMEOUT`. Callers must check whether its
    operations have stopped.
    """
    deadline = time.monotonic() + ABORT_TIMEOUT

    def check() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    try:
        BackgroundTask(group.abort, lambda _: None, "tensorfork-abort").result(check)
    except (RuntimeError, TimeoutError):
        return


def _abort_idle(group: Any) -> None:
    """Abort a group without operations before it is destroyed, however long that takes. Errors are logged."""
    try:
        group.abort()
    except RuntimeError as error:
        log.info("an idle group could not be aborted: %s", error)


@cache
def _load_kernels(device: torch.device) -> None:
    """Load the kernels that pack and unpack on a GPU.

    CUDA loads a kernel at its first launch, and may then wait for everything that the GPU does, while no other thread
    launches anything. Suppose each side loads one while an operation of another group waits for the other side: both
    would wait for ever.
    """
    for sizes in ((16, 32), (3, 5)):  # aligned, and not
        parts = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in sizes]
        torch._foreach_copy_(parts, list(torch.cat(parts).split(sizes)))


@cache
def _bucket_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream on which buckets are allocated, and nothing runs. torch reuses freed memory for the stream on which it
    was allocated: so one group's buckets become the next group's, and do not add up.
    """
    return new_stream(device)
