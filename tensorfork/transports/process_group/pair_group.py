"""A process group of two, for one device of the seed and one of the fork. Rank 0 is the seed, and sends.

Groups are constructed directly, on a store of their own: torch's default group is neither used nor changed, and may be
in use meanwhile. The contract of both kinds, over gloo and over NCCL:

- `start` does not wait for the other side.
- `finish` returns when a batch has been sent or received, and raises when the group was aborted.
- `abort` may be called from any thread, at any time. When it returns, nothing is sent or written any more, unless
  `has_stopped` says otherwise.

Not promised: that a batch which was received is whole, when the *seed's* group was aborted. With NCCL the fork's kernel
then ends as if it had its data. The seed confirms which batches left whole (see `messages`).
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import TransferFailed
from tensorfork.transports.process_group.batches import ByteRange, Limits
from tensorfork.transports.process_group.region_tensors import RegionTensors

SEED, FORK = 0, 1
"""The ranks of the two sides."""
MAX_IN_FLIGHT = 4
"""Batches that are sent or received at once; a group has as many buckets, at most."""
HANDSHAKE = bytes(range(16))
"""The first message of each group."""


@frozen
class CtaLimits:
    """NCCL's limits for the kernels of a communicator; the same on both sides. None leaves one to NCCL."""

    min_ctas: int | None = None
    max_ctas: int | None = None
    cga_cluster_size: int | None = None


@frozen
class Settings:
    """What both sides of a group must agree on. Sizes are in bytes.

    Attributes:
        nccl: whether NCCL moves what is on GPUs on both sides.
        batch: of a batch that is not packed.
        bucket: of a packed batch.
        small: copies shorter than this are packed.
        ctas: NCCL's limits.
        stable: whether the seed's memory on the CPU is sent in place. Otherwise it is copied into a bucket first, so
            that no batch of it is larger than a bucket.
    """

    nccl: bool
    batch: int
    bucket: int
    small: int
    ctas: CtaLimits = CtaLimits()
    stable: bool = False

    def uses_nccl(self, pair: tuple[str, str]) -> bool:
        """Whether NCCL, not gloo, moves what is copied between these two devices."""
        return self.nccl and "cpu" not in pair

    def limits(self, pair: tuple[str, str]) -> Limits:
        """How copies between these two devices are divided into batches: all are packed if buckets stage them."""
        direct = pair == ("cpu", "cpu") or self.uses_nccl(pair)
        in_place = self.uses_nccl(pair) or (self.stable and pair[SEED] == "cpu")
        batch = self.batch if in_place else min(self.batch, self.bucket)
        return Limits(batch, self.bucket, self.small if direct else sys.maxsize)


class PairGroup(ABC):
    """One side of such a group. See the module's docstring for what its methods promise.

    Args:
        rank: `SEED` or `FORK`.
        regions: the regions of this side.
        bucket: bytes of one bucket.
    """

    def __init__(self, rank: int, regions: RegionTensors, bucket: int) -> None:
        self.rank = rank
        self.aborted = False
        self._regions, self._bucket_bytes = regions, bucket
        self._buckets: list[torch.Tensor] = []  # allocated when the first is needed
        self._buckets_used = 0
        self._group: Any = None

    @abstractmethod
    def start(self, ranges: Sequence[ByteRange], packed: bool, deadline: float) -> Any:
        """Start to send these ranges of our regions, or to receive into them. The operation ends or fails by the
        deadline. Returns the operation, for `finish`.
        """

    @abstractmethod
    def finish(self, operation: Any, check: Callable[[], object]) -> None:
        """Wait for an operation. `check` is called repeatedly where that is possible, and may raise.

        Raises RuntimeError (torch's) or `TransferFailed`.
        """

    @abstractmethod
    def abort(self) -> None:
        """End all operations, and make later ones fail. A second call does nothing."""

    @abstractmethod
    def has_stopped(self, operation: Any) -> bool:
        """Whether nothing is read or written for this operation any more. To be called after `abort`."""

    @abstractmethod
    def handshake(self, deadline: float) -> None:
        """Exchange a first message, which makes connections and shows that both sides are in the same group."""

    @abstractmethod
    def wait_for_current_stream(self) -> None:
        """Make batches that start after this wait for what the caller's current stream still does with the memory."""

    def close(self, idle: bool = False) -> None:
        """Release everything. Operations are aborted first; `idle` promises that there are none to wait for."""
        self.abort()
        self._group = None
        self._buckets = []

    def _next_bucket(self, nbytes: int, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The first bytes of the next bucket: free, as batches end in order and at most `MAX_IN_FLIGHT` are started."""
        index = self._buckets_used % MAX_IN_FLIGHT
        self._buckets_used += 1
        if not self._buckets:  # one allocation for all, since allocators round each one up
            self._buckets = list(allocate(self._bucket_bytes * MAX_IN_FLIGHT).split(self._bucket_bytes))
        return self._buckets[index].narrow(0, 0, nbytes)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of torch's high-priority pool.

    torch hands out the same 32 streams of each pool again and again. A stream that waits for a fork must not be one on
    which an engine computes or captures; those are of the other pool.
    """
    return torch.cuda.Stream(device, priority=-1)


def handshake_message(rank: int) -> torch.Tensor:
    """The first message at the seed; at the fork, a buffer to receive it into."""
    return torch.tensor(list(HANDSHAKE if rank == SEED else bytes(len(HANDSHAKE))), dtype=torch.uint8, device="cpu")


def check_handshake(received: torch.Tensor) -> None:
    """Raise `TransferFailed` unless this is the first message."""
    if bytes(received.tolist()) != HANDSHAKE:
        raise TransferFailed("what answers in the group is not the other side of this lease")
