"""A lane: a process group of two, for one device of the seed and one of the fork. Rank 0 is the seed, and sends.

Groups are constructed directly, on a store of their own: torch's default group is neither used nor changed, and may be
in use meanwhile. What both kinds promise: `begin` does not wait for the other side; `finish` returns when a parcel has
left, or come, and raises when the lane was aborted; `abort` may be called from any thread, at any time, and when it
returns nothing is sent or written any more, unless `quiet` says otherwise.

What they do not promise: that a parcel which came is whole, where it is the seed's lane that was aborted. NCCL's fork
then sees its kernel end as if it had its data. That a parcel has left whole, the seed says (see `talk`).
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import TransferFailed
from tensorfork.transports.process_group.batches import Limits, Stretch
from tensorfork.transports.process_group.region_tensors import RegionTensors

SEED, FORK = 0, 1
WINDOW = 4
"""Parcels under way at once; as many buckets has a lane, at most."""
GREETING = bytes(range(16))


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

    def over_nccl(self, pair: tuple[str, str]) -> bool:
        """Whether NCCL, not gloo, moves what is copied between these two devices."""
        return self.nccl and "cpu" not in pair

    def limits(self, pair: tuple[str, str]) -> Limits:
        """How copies between these two devices become parcels: where buckets stage them, all are packed."""
        direct = pair == ("cpu", "cpu") or self.over_nccl(pair)
        return Limits(self.parcel, self.bucket, self.small if direct else sys.maxsize)


class PairGroup(ABC):
    """See above. `slots` are the buckets, made when they are first needed."""

    def __init__(self, rank: int, memory: RegionTensors, bucket: int) -> None:
        self.rank = rank
        self._memory, self._bucket = memory, bucket
        self._slots: list[torch.Tensor] = []
        self._packed = 0
        self._group: Any = None
        self.aborted = False

    @abstractmethod
    def begin(self, stretches: Sequence[Stretch], packed: bool, until: float) -> Any:
        """Start to send these stretches of ours, or to receive into them; by `until`, it is over in some way. The
        answer is for `finish`.
        """

    @abstractmethod
    def finish(self, begun: Any, look: Callable[[], object]) -> None:
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

    def close(self, idle: bool = False) -> None:
        """Let go of everything. What is under way is aborted first; `idle` promises that nothing is, and that need not
        be waited for.
        """
        self.abort()
        self._group = None
        self._slots = []

    def _slot(self, nbytes: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The next bucket. Parcels end in order and at most `WINDOW` are under way, so it is free."""
        turn = self._packed % WINDOW
        self._packed += 1
        if not self._slots:  # in one piece: an allocator makes of each more than it asks for
            self._slots = list(make(self._bucket * WINDOW).split(self._bucket))
        return self._slots[turn].narrow(0, 0, nbytes)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of torch's high-priority pool. Its pools hand the same 32 streams out again and again, and one that
    waits for a fork must not be one that an engine computes or captures on, which are of the other pool.
    """
    return torch.cuda.Stream(device, priority=-1)


def greeting(rank: int) -> torch.Tensor:
    """What the seed sends first, or room for it."""
    return torch.tensor(list(GREETING if rank == SEED else bytes(len(GREETING))), dtype=torch.uint8)


def check_greeting(come: torch.Tensor) -> None:
    """Raise `TransferFailed` unless it is the greeting."""
    if bytes(come.tolist()) != GREETING:
        raise TransferFailed("what answers in the group is not the other side of this lease")
