"""Turns copies into reads: how long each read is, how they are batched, and when a copy is complete."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import define, frozen

from tensorfork.regions import Copy, Region
from tensorfork.transports.transfer_engine.export import OfferedRegion


@frozen
class Window:
    """How many reads, and how many bytes, are in flight at once; and the seconds between two polls of them.

    Far below Mooncake's limits (1,024 requests to a peer; up to 2,048 wait for a second, then fail). Over nvlink these
    are the limits of one batch: a read there completes only when all reads of its thread have, so a batch is started
    and waited for as a whole.
    """

    count: int
    nbytes: int
    poll_interval: float


WINDOWS = {
    "nvlink": Window(4096, 4 << 30, 100e-6),
    "rdma": Window(256, 1 << 30, 200e-6),
    "tcp": Window(32, 256 << 20, 500e-6),
}


@define
class Read:
    """A read to be started. `copy` is the index of the copy that it belongs to; `into` and `source` are addresses."""

    copy: int
    into: int
    source: int
    nbytes: int
    device: str


def reads_of(
    copies: Sequence[Copy],
    regions: Mapping[int, Region],
    offered: Mapping[int, OfferedRegion],
    piece: int,
) -> list[Read]:
    """Split copies into reads of at most `piece` bytes, none of which crosses a boundary between registrations."""
    reads = []
    for i, copy in enumerate(copies):
        ours, theirs = regions[copy.into], offered[copy.region]
        at, end = copy.offset, copy.offset + copy.nbytes
        for boundary in [*(one for one in theirs.boundaries if at < one < end), end]:
            while at < boundary:
                nbytes = min(piece, boundary - at)
                reads.append(
                    Read(i, ours.address + copy.at + at - copy.offset, theirs.address + at, nbytes, ours.device)
                )
                at += nbytes
    return reads


class PendingCopies:
    """Counts the reads that each copy still lacks, and calls `done` with a copy's index when it is complete.

    Copies of no bytes are complete at once, in the constructor.
    """

    def __init__(self, count: int, reads: Sequence[Read], done: Callable[[int], object]) -> None:
        self._missing, self._done = Counter(read.copy for read in reads), done
        for i in range(count):
            if not self._missing[i]:
                done(i)

    def read_arrived(self, copy: int) -> None:
        """Record that one read of this copy has arrived."""
        self._missing[copy] -= 1
        if not self._missing[copy]:
            self._done(copy)


def in_batches(reads: Sequence[Read], window: Window, limited: bool, count: int) -> Iterator[list[Read]]:
    """About `count` batches, each of reads into one device. With a rate limit (`limited`), each is a single read."""
    batch: list[Read] = []
    bytes_left, most = 0, min(window.nbytes, _batch_bytes(reads, count))
    for read in reads:
        full = len(batch) == window.count or read.nbytes > bytes_left or limited
        if batch and (full or read.device != batch[0].device):
            yield batch
            batch = []
        if not batch:
            bytes_left = most
        batch.append(read)
        bytes_left -= read.nbytes
    if batch:
        yield batch


def _batch_bytes(reads: Sequence[Read], count: int) -> int:
    """The batch size that gives about `count` batches. One read's length is added, so that reads which do not fill a
    batch exactly do not lead to another batch.
    """
    sizes = [read.nbytes for read in reads]
    return sum(sizes) // count + max(sizes, default=0)
