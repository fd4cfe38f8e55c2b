"""The lane between GPUs, over NCCL."""

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from tensorfork.errors import TransferFailed
from tensorfork.transports.nccl.lane import FORK, GREETING, SEED, Ctas, Lane, check_greeting, greeting, new_stream
from tensorfork.transports.nccl.memory import Memory
from tensorfork.transports.nccl.parcels import Stretch
from tensorfork.transports.nccl.rendezvous import Task, environment, span

ABORTING = 5.0
"""Seconds that an abort may take before it is left to itself."""
POLL = 100e-6
"""Seconds between two looks whether a GPU has finished."""

_QUIET = {
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


class _Nursery:
    """Communicators are made several at once, but none while another's group is taken down: seen with torch 2.11, a
    process that did both at a time ended with a segmentation fault.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._made = self._ended = self._waiting = 0

    @contextmanager
    def making(self, until: float) -> Iterator[None]:
        """Round the making of one. Waits for a group that is being taken down, which takes half a second."""
        with self._change:
            if not self._change.wait_for(lambda: not self._ended, max(0.0, until - time.monotonic())):
                raise TransferFailed("an earlier group has not ended by the deadline")
            self._made += 1
        try:
            yield
        finally:
            with self._change:
                self._made -= 1
                self._change.notify_all()

    def end(self, held: list[Any]) -> None:
        """Let go of a group, held by nothing else, on a thread of its own when nobody makes one."""
        with self._change:
            self._waiting += 1
        Task(lambda: self._end(held), lambda _: None, "tensorfork-close")

    def settle(self) -> None:
        """Wait for that, a moment: a thread that comes back from torch when Python has ended aborts the process."""
        with self._change:
            self._change.wait_for(lambda: not self._waiting, ABORTING)

    def _end(self, held: list[Any]) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._made and not self._ended)
            self._ended += 1
        try:
            held.clear()
        finally:
            with self._change:
                self._ended -= 1
                self._waiting -= 1
                self._change.notify_all()


_nursery = _Nursery()
atexit.register(_nursery.settle)


class NcclLane(Lane):
    """Between two GPUs. Small stretches are packed on the one and unpacked on the other by kernels of torch's, on
    streams of our own, while the parcel before is on its way.
    """

    def __init__(
        self, store: Any, rank: int, memory: Memory, device: str, bucket: int, ctas: Ctas, until: float
    ) -> None:
        super().__init__(rank, memory, bucket)
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = span(until + 3600.0)  # our own watch is what aborts
        options.config.blocking = 1
        if ctas.fewest is not None:
            options.config.min_ctas = ctas.fewest
        if ctas.most is not None:
            options.config.max_ctas = ctas.most
        if ctas.cluster is not None:
            options.config.cga_cluster_size = ctas.cluster
        self._device = torch.device(device)
        self._before, self._after = new_stream(self._device), new_stream(self._device)
        with torch.cuda.device(self._device), environment(_QUIET):
            self._group = ProcessGroupNCCL(store, rank, 2, options)

    def begin(self, stretches: Sequence[Stretch], packed: bool, until: float) -> Any:
        """See `Lane.begin`. `_before` packs, and NCCL's own stream waits for it; `_after` waits for NCCL's, and
        unpacks: so parcels overlap.
        """
        views = [self._memory.view(stretch) for stretch in stretches]
        moved = views
        with torch.cuda.stream(self._before):
            if packed:
                sizes = [nbytes for _, _, nbytes in stretches]
                moved = [bucket := self._slot(sum(sizes), self._make)]
                if self.rank == SEED:
                    torch.cat(views, out=bucket)
            work = self._move(moved)
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._after):
            work.wait()
            if packed and self.rank == FORK:
                torch._foreach_copy_(views, list(bucket.split(sizes)))
            done.record()
        return done, work

    def finish(self, begun: Any, look: Callable[[], object]) -> None:
        """See `Lane.finish`. The seed sleeps until the GPU has finished, and leaves the interpreter to the engine."""
        done = begun[0]
        if self.rank == SEED:
            done.synchronize()
        else:
            while not done.query():
                look()
                time.sleep(POLL)
        if self.aborted:  # a kernel that was aborted ends as if it had done its work
            raise TransferFailed("the communicator was aborted")

    def abort(self) -> None:
        """See `Lane.abort`."""
        group, again, self.aborted = self._group, self.aborted, True
        if group is None or again:
            return
        patience = time.monotonic() + ABORTING

        def look() -> None:
            if time.monotonic() > patience:
                raise TimeoutError

        try:
            Task(group.abort, lambda _: None, "tensorfork-abort").result(look)
        except (RuntimeError, TimeoutError):
            return  # `quiet` tells whether it has stopped all the same

    def quiet(self, begun: Any) -> bool:
        """See `Lane.quiet`."""
        try:
            return bool(begun[0].query())
        except RuntimeError:  # the device has failed, and does nothing more
            return True

    def greet(self, until: float) -> None:
        """See `Lane.greet`. Here NCCL makes its communicator, which takes most of a second."""
        with torch.cuda.stream(self._before), _nursery.making(until):
            come = self._make(len(GREETING)).copy_(greeting(self.rank))
            work = self._move([come])
        done = torch.cuda.Event()
        with torch.cuda.stream(self._after):
            work.wait()
            done.record()
        while not done.query():
            if self.aborted or time.monotonic() > until:
                raise TransferFailed("the first message over NCCL did not arrive")
            time.sleep(0.001)
        check_greeting(come.cpu())

    def prepare(self) -> None:
        """See `Lane.prepare`."""
        self._before.wait_stream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """See `Lane.close`. torch's own watchdog takes a moment to end: not at our caller's cost."""
        self.abort()
        held, self._group, self._slots = [self._group], None, []
        if held[0] is not None:
            _nursery.end(held)

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
        with torch.cuda.stream(_shelf(self._device)):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


@cache
def _shelf(device: torch.device) -> torch.cuda.Stream:
    """A stream that buckets are allocated for, and nothing runs on. torch keeps what is freed for the stream it was
    allocated for; so one lane's buckets become the next one's, instead of adding up.
    """
    return new_stream(device)
