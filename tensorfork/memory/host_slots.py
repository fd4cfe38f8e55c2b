"""Host memory in which answers wait to be sent: one bounded pool for the whole process.

Each lease has a share of the pool for itself while it is open: a few slots, each of which holds one answer. So a lease
whose fork reads slowly, or not at all, keeps its own slots and nobody else's. The first leases get large slots, those
after them smaller ones.

Why large ones: each answer wakes four threads, the seed's two and the fork's two. On two cores, answers of 2 MiB were
the fastest in nearly every sweep, those of 1 MiB a tenth slower, of 512 or 256 KiB about half as fast. Larger than
2 MiB was no better, nor were more than two slots where a fork has one connection. Where 64 forks came at once, those
with answers of 32 KiB took 2.3 times as long as with 256 KiB, and four times the seed's processor; with 128 KiB, 1.1
times.

The memory is there while a share is open, and what was never used of it takes none. Shares that GPUs copy from or into
are pinned, once: then the memory stays.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from attrs import frozen

from tensorfork.errors import TensorForkError
from tensorfork.exhaustion import MEMORY, exhaustion
from tensorfork.memory import cuda

SHARES = ((1, 4, 2 << 20), (4, 2, 1 << 20), (64, 2, 128 << 10))
"""How many shares there are of each kind, the slots of each, and the bytes of a slot; 32 MiB in all."""
POOL_BYTES = sum(count * slots * nbytes for count, slots, nbytes in SHARES)
_HUGE_PAGE = 2 << 20


class NoShareLeft(TensorForkError):
    """All shares of the pool are open."""


@frozen
class Share:
    """Slots of the pool, which are the holder's until he closes it.

    Attributes:
        slot_bytes: the size of each.
        slots: their addresses.
    """

    slot_bytes: int
    slots: Sequence[int]
    _kind: int
    _number: int
    _pool: "SlotPool"

    def close(self) -> None:
        """Return the slots. Nothing may read or write them any more. Call it once."""
        self._pool.close_share(self._kind, self._number)


class SlotPool:
    """Gives out shares. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = [list(reversed(range(count))) for count, _, _ in SHARES]
        self._memory: mmap.mmap | None = None
        self._pinned: set[int] = set()
        """The addresses of shares that are pinned. They stay so, and the memory mapped: to unpin waits for the GPU."""
        self._start = 0

    def open_share(self, pinned_for: str | None = None) -> Share:
        """A share with the largest slots that are left, pinned if a GPU is named that copies from it or into it.

        Raises `NoShareLeft`, and `ResourceExhausted` where the driver cannot pin it.
        """
        with self._lock:
            start = 0
            for kind, (count, slots, nbytes) in enumerate(SHARES):
                if self._free[kind]:
                    self._map()
                    number = self._free[kind].pop()
                    first = self._start + start + number * slots * nbytes
                    if pinned_for is not None:
                        self._pin(kind, number, first, slots * nbytes, pinned_for)
                    return Share(nbytes, [first + i * nbytes for i in range(slots)], kind, number, self)
                start += count * slots * nbytes
        raise NoShareLeft(
            f"this process has {sum(count for count, _, _ in SHARES)} leases that send its memory already"
        )

    def close_share(self, kind: int, number: int) -> None:
        """Take a share back; see `Share.close`."""
        with self._lock:
            self._free[kind].append(number)
            if (
                self._memory is not None
                and not self._pinned
                and all(len(free) == count for free, (count, _, _) in zip(self._free, SHARES, strict=True))
            ):
                self._memory.close()
                self._memory = None

    def _pin(self, kind: int, number: int, first: int, nbytes: int, device: str) -> None:
        if first in self._pinned:
            return
        try:
            cuda.pin(first, nbytes, cuda.device_index(device))
        except cuda.DriverError as error:
            self._free[kind].append(number)
            raise exhaustion(f"{nbytes:,} bytes of memory cannot be pinned ({error})", MEMORY) from error
        self._pinned.add(first)

    def _map(self) -> None:
        """Map the memory if it is not mapped, in huge pages where the kernel has them: `host_reads` is faster then."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, POOL_BYTES + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._start = start + -start % _HUGE_PAGE


_pools: dict[int, SlotPool] = {}


def pool() -> SlotPool:
    """This process's pool. A child of os.fork() has one of its own: the parent's slots are the parent's."""
    return _pools.setdefault(os.getpid(), SlotPool())
