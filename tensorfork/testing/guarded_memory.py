"""Memory with known contents, and guard bytes on both sides of every region."""

from collections.abc import Sequence

import torch

from tensorfork import Region

_FRONTS = (61, 512, 4096, 3)
"""Guard bytes before a region, in turn; most are odd, so that most regions begin at odd addresses."""
_BACK = 67
"""Guard bytes after a region."""


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
    """

    def __init__(self, device: str, sizes: Sequence[int], number: int) -> None:
        self.device, self.sizes = device, list(sizes)
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
            Region(self.id(i), buffer.data_ptr() + front, nbytes, self.device, buffer)
            for i, (buffer, front, nbytes) in enumerate(zip(self._buffers, self._fronts, self.sizes, strict=True))
        ]

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
