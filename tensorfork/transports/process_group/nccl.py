"""The lane between GPUs, over NCCL."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from tensorfork.errors import TransferFailed
from tensorfork.interpreter.environment import environment
from tensorfork.memory import streams
from tensorfork.transports.process_group.batches import Stretch
from tensorfork.transports.process_group.communicator_gate import communicator_gate
from tensorfork.transports.process_group.pair_group import (
    FORK,
    GREETING,
    SEED,
    Ctas,
    PairGroup,
    check_greeting,
    greeting,
    new_stream,
)
from tensorfork.transports.process_group.region_tensors import RegionTensors
from tensorfork.transports.process_group.rendezvous import time_left
from tensorfork.transports.process_group.tasks import BackgroundTask

log = logging.getLogger("tensorfork")

ABORTING = 5.0
"""Seconds that an abort may take before it is left to itself."""
POLL = 100e-6
"""Seconds between two looks whether a GPU has finished."""

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
    """Between two GPUs. Small stretches are packed on the one and unpacked on the other by kernels of torch's, on
    streams of our own, while the parcel before is on its way.
    """

    def __init__(
        self, store: Any, rank: int, memory: RegionTensors, device: str, bucket: int, ctas: Ctas, until: float
    ) -> None:
        super().__init__(rank, memory, bucket)
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = time_left(until + 3600.0)  # our own watch is what aborts
        options.config.blocking = 1
        if ctas.fewest is not None:
            options.config.min_ctas = ctas.fewest
        if ctas.most is not None:
            options.config.max_ctas = ctas.most
        if ctas.cluster is not None:
            options.config.cga_cluster_size = ctas.cluster
        self._device = torch.device(device)
        self._before, self._after = new_stream(self._device), new_stream(self._device)
        with torch.cuda.device(self._device), environment(ENVIRONMENT):
            self._group = ProcessGroupNCCL(store, rank, 2, options)

    def begin(self, stretches: Sequence[Stretch], packed: bool, until: float) -> Any:
        """See `PairGroup.begin`. `_before` packs, and NCCL's own stream waits for it; `_after` waits for NCCL's, and
        unpacks: so parcels overlap.
        """
        views = [self._memory.view(stretch) for stretch in stretches]
        moved = views
        with streams.on_stream(self._before):
            if packed:
                sizes = [nbytes for _, _, nbytes in stretches]
                moved = [bucket := self._slot(sum(sizes), self._make)]
                if self.rank == SEED:
                    torch.cat(views, out=bucket)
            work = self._move(moved)
        done = torch.cuda.Event(blocking=True)
        with streams.on_stream(self._after):
            work.wait()
            if packed and self.rank == FORK:
                torch._foreach_copy_(views, list(bucket.split(sizes)))
            done.record()
        return done, work, moved  # whoever keeps this keeps the bucket that may be written to

    def finish(self, begun: Any, look: Callable[[], object]) -> None:
        """See `PairGroup.finish`. The seed sleeps until the GPU has finished, and leaves the interpreter to the engine.

        A kernel that was aborted ends as if it had done its work. `abort` says so before it aborts, and here that is
        looked at after the kernel's end: what is not known as aborted by then was not.
        """
        done = begun[0]
        if self.rank == SEED:
            done.synchronize()
        else:
            while not done.query():
                look()
                time.sleep(POLL)
        if self.aborted:
            raise TransferFailed("the communicator was aborted")

    def abort(self) -> None:
        """See `PairGroup.abort`."""
        group, again, self.aborted = self._group, self.aborted, True
        if group is None or again:
            return
        with communicator_gate.aborting():
            _abort(group)

    def quiet(self, begun: Any) -> bool:
        """See `PairGroup.quiet`."""
        try:
            return bool(begun[0].query())
        except RuntimeError:  # the device has failed, and does nothing more
            return True

    def greet(self, until: float) -> None:
        """See `PairGroup.greet`. Here NCCL makes its communicator, which takes about half a second."""
        with streams.on_stream(self._before), communicator_gate.making(self._memory, until):
            _load_kernels(self._device)
            come = self._make(len(GREETING)).copy_(greeting(self.rank))
            work = self._move([come])
        done = torch.cuda.Event()
        with streams.on_stream(self._after):
            work.wait()
            done.record()
        while not done.query():
            if self.aborted or time.monotonic() > until:
                raise TransferFailed("the first message over NCCL did not arrive")
            time.sleep(0.001)
        check_greeting(come.cpu())

    def prepare(self) -> None:
        """See `PairGroup.prepare`."""
        self._before.wait_stream(torch.cuda.current_stream(self._device))

    def close(self, idle: bool = False) -> None:
        """See `PairGroup.close`. An abort takes half a second, and torch's own watchdog a moment to end: where nothing is
        under way, neither is at our caller's cost. The group and the buckets are kept until then.
        """
        if not idle:
            self.abort()
        stop = None if self.aborted else _quit
        self.aborted = True
        held, self._group, self._slots = [self._group, self._slots], None, []
        if held[0] is not None:
            communicator_gate.end(held, stop)

    def _move(self, tensors: Sequence[torch.Tensor]) -> Any:
        """One operation of NCCL's for all. What was begun must be ended, whatever happens: the thread may be the
        caller's.
        """
        move = self._group.send if self.rank == SEED else self._group.recv
        self._group._start_coalescing()
        try:
            for tensor in tensors:
                move([tensor], 1 - self.rank, 0)
        finally:
            work = self._group._end_coalescing()
        return work

    def _make(self, nbytes: int) -> torch.Tensor:
        with streams.on_stream(_bucket_stream(self._device)):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def warm_up_thread(memory: RegionTensors, device: str) -> None:
    """Do on this thread what CUDA and torch take half a millisecond for when a thread first uses a GPU; better before
    the first parcel is begun.
    """
    with streams.on_stream(_bucket_stream(torch.device(device))):
        memory.view(memory.byte_on(device))
        torch.cuda.Event(blocking=True).record()


def _abort(group: Any) -> None:
    """End what a group does, within `ABORTING`; whether it has stopped must be looked at all the same."""
    patience = time.monotonic() + ABORTING

    def look() -> None:
        if time.monotonic() > patience:
            raise TimeoutError

    try:
        BackgroundTask(group.abort, lambda _: None, "tensorfork-abort").result(look)
    except (RuntimeError, TimeoutError):
        return


def _quit(group: Any) -> None:
    """Abort a group that does nothing; it is let go of next, however that ends. Takes as long as it takes."""
    try:
        group.abort()
    except RuntimeError as error:
        log.info("a group that did nothing could not be aborted: %s", error)


@cache
def _load_kernels(device: torch.device) -> None:
    """Have the kernels that pack and unpack on a GPU. CUDA loads one at its first launch, and may wait for all that the
    GPU does, while nobody else launches anything: beside an operation that waits for the other side, which loads one
    beside another group's that waits for this side, both would wait for ever.
    """
    for sizes in ((16, 32), (3, 5)):  # aligned, and not
        parts = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for nbytes in sizes]
        torch._foreach_copy_(parts, list(torch.cat(parts).split(sizes)))


@cache
def _bucket_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that buckets are allocated for, and nothing runs on. torch keeps what is freed for the stream it was
    allocated for; so one lane's buckets become the next one's, instead of adding up.
    """
    return new_stream(device)
