"""Memory with known contents, and guard bytes on both sides of every region."""

import ctypes
import mmap
from collections.abc import Iterator, Sequence

import torch

from tensorfork import Region

_FRONTS = (61, 512, 4096, 3)
"""Guard bytes before a region, in turn; most are odd, so that most regions begin at odd addresses."""
_BACK = 67
"""Guard bytes after a region."""

_PROT_NONE, _MAP_FIXED = 0, 0x10


def pattern(number: int, nbytes: int) -> torch.Tensor:
    """Pseudo-random bytes in host memory; the same for the same number, in every process."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-nbytes // 8),), dtype=torch.int64, generator=generator)
    return words.view(torch.uint8)[:nbytes]


def contents(number: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The contents of the regions of a `GuardedMemory` with these sizes and this number."""
    return [pattern(1000 * number + i, nbytes) for i, nbytes in enumerate(sizes)]


class GuardedMemory:
    """Regions on a device, with known contents and guard bytes round each.

    It knows what every byte should be. A test that lets something be written calls `expect`, so that
    `first_difference` finds only what should not have been written.

    Attributes:
        published: the ranges of each region that another process may read, as in `Region`; None for all.
    """

    published: Sequence[tuple[int, int]] | None = None

    def __init__(self, device: str, sizes: Sequence[int], number: int) -> None:
        self.device, self.sizes, self.number = device, list(sizes), number
        self._fronts = [_FRONTS[i % len(_FRONTS)] for i in range(len(self.sizes))]
        self._expected = [
            pattern(10_000_000 + i, front + nbytes + _BACK)
            for i, (front, nbytes) in enumerate(zip(self._fronts, self.sizes, strict=True))
        ]
        self._buffers = [torch.empty(one.numel(), dtype=torch.uint8, device=device) for one in self._expected]
        for buffer, expected in zip(self._buffers, self._expected, strict=True):
            buffer.copy_(expected)
        self.fill(number)

    def fill(self, number: int) -> None:
        """Write `contents(number)` into the regions; it is there when this returns."""
        self.number = number
        for i, new in enumerate(contents(number, self.sizes)):
            self.expect(i, 0, new)
            self.view(i, 0, self.sizes[i]).copy_(new)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def poison(self) -> None:
        """Invert every byte of the regions, so that any later write shows."""
        for i, nbytes in enumerate(self.sizes):
            inverted = self._expected_view(i, 0, nbytes).bitwise_not_()
            self.view(i, 0, nbytes).copy_(inverted)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    @property
    def regions(self) -> list[Region]:
        """A region for each size; the ids are neither dense nor in order."""
        return [
            Region(self.id(i), buffer.data_ptr() + front, nbytes, self.device, buffer, self.published)
            for i, (buffer, front, nbytes) in enumerate(zip(self._buffers, self._fronts, self.sizes, strict=True))
        ]

    def unmap(self) -> None:
        """Unmap the whole pages within each region, on the CPU. Nothing may touch them until `map` is called."""
        for address, nbytes in self._pages():
            _map(address, nbytes, _PROT_NONE)

    def map(self) -> None:
        """Map what `unmap` has unmapped, with the contents that it had."""
        for address, nbytes in self._pages():
            _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
        self.fill(self.number)

    def _pages(self) -> Iterator[tuple[int, int]]:
        assert self.device == "cpu", "only memory on the CPU is unmapped"
        for region in self.regions:
            start = -(-region.address // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (region.address + region.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                yield start, end - start

    def id(self, index: int) -> int:
        """The id of a region."""
        return 7 + (index ^ 1) * 3

    def expect(self, index: int, at: int, new: torch.Tensor) -> None:
        """From now on, a region should hold these bytes at offset `at`."""
        self._expected_view(index, at, new.numel()).copy_(new)

    def view(self, index: int, at: int, nbytes: int) -> torch.Tensor:
        """A view of bytes of a region."""
        start = self._fronts[index] + at
        return self._buffers[index][start : start + nbytes]

    def _expected_view(self, index: int, at: int, nbytes: int) -> torch.Tensor:
        start = self._fronts[index] + at
        return self._expected[index][start : start + nbytes]

    def first_difference(self, ignore: Sequence[tuple[int, int]] = ()) -> str | None:
        """A sentence about the first byte that is not what it should be; None if all are.

        `ignore` are spans of memory, as (address, bytes), that are not compared.
        """
        for i, (buffer, expected) in enumerate(zip(self._buffers, self._expected, strict=True)):
            actual = buffer.cpu()
            if torch.equal(actual, expected):
                continue
            differ = actual != expected
            for address, nbytes in ignore:
                start = address - buffer.data_ptr()
                differ[max(0, start) : max(0, start + nbytes)] = False
            if differ.any():
                at = int(differ.nonzero()[0])
                where = f"byte {at - self._fronts[i]:,} of region {i} ({self.sizes[i]:,} bytes)"
                count = int(differ.sum())
                return f"{where} is {int(actual[at])}, not {int(expected[at])}; {count:,} bytes differ in it"
        return None


def _map(address: int, nbytes: int, protection: int) -> None:
    """Replace whole pages by new ones. Without a permission they are as good as unmapped, and nobody else gets them."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if libc.mmap(address, nbytes, protection, flags, -1, 0) != address:
        raise OSError(ctypes.get_errno(), "mmap failed")
