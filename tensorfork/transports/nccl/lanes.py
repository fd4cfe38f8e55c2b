"""A lane: a process group of two, for one device of the seed and one of the fork. Rank 0 is the seed, and sends.

Groups are constructed directly, on a store of their own: torch's default group is neither used nor changed, and may be
in use meanwhile. What both kinds promise: `begin` does not wait for the other side; `finish` returns when a parcel is
where it should be, and raises when the lane was aborted; `abort` may be called from any thread, at any time, and when
it returns nothing is sent or written any more.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.transports.nccl.memory import Memory, gather, scatter
from tensorfork.transports.nccl.parcels import Limits, Stretch
from tensorfork.transports.nccl.rendezvous import Task, environment, span

SEED, FORK = 0, 1
WINDOW = 4
"""Parcels under way at once; as many buckets has a lane, at most."""
GREETING = bytes(range(16))
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


@frozen
class Ctas:
    """NCCL's limits for the kernels of a communicator; the same on both sides. None leaves one to NCCL."""

    fewest: int | None = None
    most: int | None = None
    cluster: int | None = None


@frozen
class Settings:
    """What both sides of a lane must agree on, in bytes where it is a size.

    Attributes:
        nccl: whether NCCL moves what lies on GPUs on both sides.
        parcel: of one parcel.
        bucket: of one packed parcel.
        small: copies shorter than this are packed.
        ctas: NCCL's limits.
    """

    nccl: bool
    parcel: int
    bucket: int
    small: int
    ctas: Ctas = Ctas()

    def limits(self, pair: tuple[str, str]) -> Limits:
        """How copies between these two devices become parcels: where buckets stage them, all are packed."""
        direct = pair == ("cpu", "cpu") or (self.nccl and "cpu" not in pair)
        return Limits(self.parcel, self.bucket, self.small if direct else sys.maxsize)


class Lane(ABC):
    """See above. `slots` are the buckets, made when they are first needed."""

    def __init__(self, rank: int, memory: Memory, bucket: int) -> None:
        self.rank = rank
        self._memory, self._bucket = memory, bucket
        self._slots: list[torch.Tensor] = []
        self._packed = 0
        self._group: Any = None
        self.aborted = False

    @abstractmethod
    def begin(self, stretches: Sequence[Stretch], packed: bool) -> Any:
        """Start to send these stretches of ours, or to receive into them. The answer is for `finish`."""

    @abstractmethod
    def finish(self, begun: Any, until: float, look: Callable[[], object]) -> None:
        """Wait for what was begun. `look` is called now and then where that is possible, and may raise.

        Raises RuntimeError (torch's) or `TransferFailed`.
        """

    @abstractmethod
    def abort(self) -> None:
        """End whatever is under way, and all that may come. A second time does nothing."""

    @abstractmethod
    def quiet(self, begun: Any) -> bool:
        """Whether nothing is read or written for this any more; asked after an abort."""

    @abstractmethod
    def greet(self, until: float) -> None:
        """Exchange a first message: connections are made, and both know that they mean the same lane."""

    @abstractmethod
    def prepare(self) -> None:
        """Before parcels are begun: what the caller's current stream still does with the memory comes first."""

    def close(self) -> None:
        """Let go of everything; nothing may be under way, or it is aborted."""
        self.abort()
        self._group = None
        self._slots = []

    def _slot(self, nbytes: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The next bucket. Parcels end in order and at most `WINDOW` are under way, so it is free."""
        turn = self._packed % WINDOW
        self._packed += 1
        if turn == len(self._slots):
            self._slots.append(make(self._bucket))
        return self._slots[turn].narrow(0, 0, nbytes)


class GlooLane(Lane):
    """Over TCP, between memory of the CPU; what is on a GPU is staged through pinned buckets."""

    def __init__(
        self, store: Any, rank: int, memory: Memory, device: str, bucket: int, address: str, until: float
    ) -> None:
        super().__init__(rank, memory, bucket)
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._threads = span(until), 1
        try:
            with environment({"TORCH_GLOO_LAZY_INIT": "0"}):
                options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        except RuntimeError as error:
            raise TransportUnavailable(f"gloo cannot listen at {address}: {error}. Check the interface.") from error
        self._stream = torch.cuda.Stream(torch.device(device)) if device != "cpu" else None
        self._group = ProcessGroupGloo(store, rank, 2, options)

    def begin(self, stretches: Sequence[Stretch], packed: bool) -> Any:
        """See `Lane.begin`."""
        if not packed:
            return self._move([self._memory.view(stretch) for stretch in stretches]), (), None
        bucket = self._slot(sum(nbytes for _, _, nbytes in stretches), self._make)
        if self.rank == SEED:
            if self._stream is None:
                gather(self._memory, stretches, bucket)
            else:
                self._stage(stretches, bucket)
        return self._move([bucket]), stretches if self.rank == FORK else (), bucket

    def finish(self, begun: Any, until: float, look: Callable[[], object]) -> None:
        """See `Lane.finish`. Cannot look up while it waits: gloo only ever waits for something to the end."""
        works, stretches, bucket = begun
        for work in works:
            if not work.wait(span(until)) or self.aborted:
                raise TransferFailed("gloo gave up a transfer")
        if self._stream is not None and stretches:
            self._stage(stretches, bucket)
        elif stretches:
            scatter(self._memory, stretches, bucket)

    def abort(self) -> None:
        """See `Lane.abort`. What gloo has for this is that a wait which times out closes the connection for all."""
        group, self.aborted = self._group, True
        if group is not None:
            try:
                group.recv([torch.zeros(1, dtype=torch.uint8)], 1 - self.rank, 1).wait(span(0.0))
            except RuntimeError:
                return  # as it should be

    def quiet(self, begun: Any) -> bool:
        """See `Lane.quiet`. The connection is closed under gloo's own lock."""
        return True

    def greet(self, until: float) -> None:
        """See `Lane.greet`."""
        greeting = torch.tensor(list(GREETING if self.rank == SEED else bytes(16)), dtype=torch.uint8)
        for work in self._move([greeting]):
            work.wait(span(until))
        _check(greeting)

    def prepare(self) -> None:
        """See `Lane.prepare`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _move(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        move = self._group.send if self.rank == SEED else self._group.recv
        return [move([tensor], 1 - self.rank, 0) for tensor in tensors]

    def _make(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def _stage(self, stretches: Sequence[Stretch], bucket: torch.Tensor) -> None:
        """Between a GPU and a bucket of the host."""
        assert self._stream is not None
        sizes = [nbytes for _, _, nbytes in stretches]
        with torch.cuda.stream(self._stream):
            for stretch, part in zip(stretches, bucket.split(sizes), strict=True):
                if self.rank == SEED:
                    part.copy_(self._memory.view(stretch), non_blocking=True)
                else:
                    self._memory.view(stretch).copy_(part, non_blocking=True)
            self._stream.synchronize()


class NcclLane(Lane):
    """Between two GPUs. Small stretches are packed on the one and unpacked on the other by kernels of torch's, on
    streams of our own, while the parcel before is on its way.
    """

    def __init__(
        self, store: Any, rank: int, memory: Memory, device: str, bucket: int, ctas: Ctas, until: float
    ) -> None:
        super().__init__(rank, memory, bucket)
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = span(until + 3600.0)  # our own watch is what aborts
        options.config.blocking = 1
        if ctas.fewest is not None:
            options.config.min_ctas = ctas.fewest
        if ctas.most is not None:
            options.config.max_ctas = ctas.most
        if ctas.cluster is not None:
            options.config.cga_cluster_size = ctas.cluster
        self._device = torch.device(device)
        self._before, self._after = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        with environment(_QUIET):
            self._group = ProcessGroupNCCL(store, rank, 2, options)

    def begin(self, stretches: Sequence[Stretch], packed: bool) -> Any:
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

    def finish(self, begun: Any, until: float, look: Callable[[], object]) -> None:
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
        greeting = torch.tensor(list(GREETING if self.rank == SEED else bytes(16)), dtype=torch.uint8)
        with torch.cuda.stream(self._before):
            greeting = greeting.to(self._device)
            work = self._move([greeting])
        done = torch.cuda.Event()
        with torch.cuda.stream(self._after):
            work.wait()
            done.record()
        while not done.query():
            if self.aborted or time.monotonic() > until:
                raise TransferFailed("the first message over NCCL did not arrive")
            time.sleep(0.001)
        _check(greeting.cpu())

    def prepare(self) -> None:
        """See `Lane.prepare`."""
        self._before.wait_stream(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """See `Lane.close`. torch's own watchdog takes a moment to end: not at our caller's cost."""
        self.abort()
        held, self._group, self._slots = [self._group], None, []
        if held[0] is not None:
            Task(held.clear, lambda _: None, "tensorfork-close")

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
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def _check(greeting: torch.Tensor) -> None:
    if bytes(greeting.tolist()) != GREETING:
        raise TransferFailed("what answers in the group is not the other side of this lease")


def make(
    pair: tuple[str, str], store: Any, rank: int, memory: Memory, settings: Settings, address: str, until: float
) -> Lane:
    """A lane between the seed's device and the fork's, greeted. Raises RuntimeError (torch's) or our own errors."""
    lane: Lane
    if settings.nccl and "cpu" not in pair:
        lane = NcclLane(store, rank, memory, pair[rank], settings.bucket, settings.ctas, until)
    else:
        lane = GlooLane(store, rank, memory, pair[rank], settings.bucket, address, until)
    try:
        lane.greet(until)
    except BaseException:
        lane.close()
        raise
    return lane
