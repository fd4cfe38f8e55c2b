"""Copies into reads: how long each is, how many are under way at once, and how fast they follow one another."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import define, frozen

from tensorfork.regions import Copy, Region
from tensorfork.transports.transfer_engine.export import OfferedRegion

BATCHES = 4
"""About so many are made for each thread of what is read in batches, if there are so many reads: so that there is
progress."""


@frozen
class Window:
    """How much is under way at once, and how long to wait before looking again.

    Far below Mooncake's limits (1,024 requests to a peer; up to 2,048 wait for a second, then fail). Over nvlink it is
    what one batch has: a read there is over when all of its thread's are, so they are begun and waited for together.
    """

    count: int
    nbytes: int
    pause: float


WINDOWS = {
    "nvlink": Window(4096, 4 << 30, 100e-6),
    "rdma": Window(256, 1 << 30, 200e-6),
    "tcp": Window(32, 256 << 20, 500e-6),
}


@define
class Read:
    """A read that is still to be begun, of the copy of that number."""

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
    """The copies in pieces that cross no registration."""
    jobs = []
    for i, copy in enumerate(copies):
        ours, theirs = regions[copy.into], offered[copy.region]
        at, end = copy.offset, copy.offset + copy.nbytes
        for cut in [*(cut for cut in theirs.cuts if at < cut < end), end]:
            while at < cut:
                nbytes = min(piece, cut - at)
                jobs.append(
                    Read(i, ours.address + copy.at + at - copy.offset, theirs.address + at, nbytes, ours.device)
                )
                at += nbytes
    return jobs


class Arrivals:
    """Counts what has arrived of copies, and says `done` for each when it is whole: those of no bytes at once."""

    def __init__(self, copies: int, jobs: Sequence[Read], done: Callable[[int], object]) -> None:
        self._left, self._done = Counter(job.copy for job in jobs), done
        for i in range(copies):
            if not self._left[i]:
                done(i)

    def count(self, copy: int) -> None:
        """One read of this copy has arrived."""
        self._left[copy] -= 1
        if not self._left[copy]:
            self._done(copy)


def in_batches(jobs: Sequence[Read], window: Window, rate: float | None, count: int) -> Iterator[list[Read]]:
    """About so many batches, each of jobs of one device; with a rate, one at a time."""
    batch: list[Read] = []
    room, most = 0, min(window.nbytes, _share(jobs, count))
    for job in jobs:
        full = len(batch) == window.count or job.nbytes > room or rate is not None
        if batch and (full or job.device != batch[0].device):
            yield batch
            batch = []
        if not batch:
            room = most
        batch.append(job)
        room -= job.nbytes
    if batch:
        yield batch


def _share(jobs: Sequence[Read], count: int) -> int:
    """Bytes of one of so many batches, with which what does not fit to the byte makes no further one."""
    sizes = [job.nbytes for job in jobs]
    return sum(sizes) // count + max(sizes, default=0)
