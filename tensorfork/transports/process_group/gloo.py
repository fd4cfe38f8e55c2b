"""The lane between CPUs, over gloo's TCP.

A parcel is a broadcast from the seed, which for two is a send and a receive, because torch can be asked whether a
broadcast is over, and waits for one in a thread of its own. Gloo has no way to abort: what it has is a wait that times
out, which closes the connection. Nothing is sent or written after that, but whoever waits for a message of which bytes
have moved already is not told, and waits on, in that thread, until the message's own time is over.
"""

import atexit
import ctypes
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter.environment import Changes, environment
from tensorfork.memory import streams
from tensorfork.transports.process_group.batches import Stretch
from tensorfork.transports.process_group.pair_group import (
    FORK,
    SEED,
    WINDOW,
    PairGroup,
    check_greeting,
    greeting,
    new_stream,
)
from tensorfork.transports.process_group.region_tensors import RegionTensors, gather, scatter
from tensorfork.transports.process_group.rendezvous import time_left

SLICES = {SEED: datetime.timedelta(milliseconds=50), FORK: datetime.timedelta(milliseconds=5)}
"""Of one wait; between two, whoever waits looks up. The fork has to hear the seed's words meanwhile."""
PROBE = 0.05
"""Seconds between two looks whether the connection is closed; each leaves something behind until the group ends."""

_parked: list[tuple[Any, list[Any]]] = []
"""Groups that are closed, each with what its threads still wait for: to end one earlier would wait with them."""
_parking = threading.Lock()


def gloo_environment() -> Changes:
    """What torch must read when it constructs a device of gloo's: connections are made at once. That is its default."""
    return {"TORCH_GLOO_LAZY_INIT": "0"} if "TORCH_GLOO_LAZY_INIT" in os.environ else {}


class GlooGroup(PairGroup):
    """Between memory of the CPU; what is on a GPU is staged through pinned buckets."""

    def __init__(
        self, store: Any, rank: int, memory: RegionTensors, device: str, bucket: int, address: str, until: float
    ) -> None:
        super().__init__(rank, memory, bucket)
        from torch.distributed import ProcessGroupGloo

        _clear_up()
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._threads = time_left(until), WINDOW
        try:
            with environment(gloo_environment()):
                options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        except RuntimeError as error:
            raise TransportUnavailable(f"gloo cannot listen at {address}: {error}. Check the interface.") from error
        self._stream = new_stream(torch.device(device)) if device != "cpu" else None
        self._under_way: list[Any] = []
        self._group = ProcessGroupGloo(store, rank, 2, options)

    def begin(self, stretches: Sequence[Stretch], packed: bool, until: float) -> Any:
        """See `PairGroup.begin`."""
        if not packed:
            return [self._move(self._memory.view(stretch), until) for stretch in stretches], (), None
        bucket = self._slot(sum(nbytes for _, _, nbytes in stretches), self._make)
        if self.rank == FORK:
            return [self._move(bucket, until)], stretches, bucket
        if self._stream is None:
            gather(self._memory, stretches, bucket)
        else:
            self._stage(stretches, bucket)
        return [self._move(bucket, until)], (), bucket

    def finish(self, begun: Any, look: Callable[[], object]) -> None:
        """See `PairGroup.finish`."""
        works, stretches, bucket = begun
        probe = time.monotonic() + PROBE
        for work in works:
            while not self._over(work):
                look()
                if time.monotonic() >= probe:
                    self._probe()
                    probe = time.monotonic() + PROBE
            self._under_way.remove(work)
        if self.aborted:
            raise TransferFailed("the transfer was aborted")
        if self._stream is not None and stretches:
            self._stage(stretches, bucket)
        elif stretches:
            scatter(self._memory, stretches, bucket)

    def abort(self) -> None:
        """See `PairGroup.abort`."""
        group, self.aborted = self._group, True
        if group is not None:
            try:
                self._nothing(group).wait(time_left(0.0))
            except RuntimeError:
                return  # as it should be

    def quiet(self, begun: Any) -> bool:
        """See `PairGroup.quiet`. The connection is closed under gloo's own lock."""
        return True

    def greet(self, until: float) -> None:
        """See `PairGroup.greet`."""
        come = greeting(self.rank)
        work = self._move(come, until)
        while not self._over(work):
            if time.monotonic() >= until:
                raise TransferFailed("the first message over gloo did not arrive")
        self._under_way.remove(work)
        check_greeting(come)

    def close(self, idle: bool = False) -> None:
        """See `PairGroup.close`."""
        group = self._group
        super().close(idle)
        if group is not None:
            with _parking:
                _parked.append((group, self._under_way))
        del group
        _clear_up()

    def prepare(self) -> None:
        """See `PairGroup.prepare`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _move(self, tensor: torch.Tensor, until: float) -> Any:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = SEED
        options.timeout = time_left(until)
        work = self._group.broadcast([tensor], options)
        self._under_way.append(work)
        return work

    def _over(self, work: Any) -> bool:
        """Whether it is, after a moment's wait. Raises RuntimeError, torch's, if it failed."""
        try:
            work.wait(SLICES[self.rank])
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()
        return True

    def _probe(self) -> None:
        """Raise RuntimeError if the connection is closed."""
        self._nothing(self._group)

    def _nothing(self, group: Any) -> Any:
        """Ask for a message that the other side never sends."""
        return group.recv([torch.empty(1, dtype=torch.uint8)], 1 - self.rank, 0)

    def _make(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def _stage(self, stretches: Sequence[Stretch], bucket: torch.Tensor) -> None:
        """Between a GPU and a bucket of the host."""
        assert self._stream is not None
        sizes = [nbytes for _, _, nbytes in stretches]
        with streams.on_stream(self._stream):
            for stretch, part in zip(stretches, bucket.split(sizes), strict=True):
                if self.rank == SEED:
                    part.copy_(self._memory.view(stretch), non_blocking=True)
                else:
                    self._memory.view(stretch).copy_(part, non_blocking=True)
            self._stream.synchronize()


def _clear_up() -> None:
    """Let go of the closed groups whose threads have nothing to wait for any more."""
    with _parking:
        left = [(group, works) for group, works in _parked if not all(work.is_completed() for work in works)]
        gone, _parked[:] = _parked[:], left
    del gone, left


@atexit.register
def _leave_behind() -> None:
    """A process that ends does not wait for them either."""
    for group, _ in _parked:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
