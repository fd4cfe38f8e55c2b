"""Memory of known bytes, with known bytes round them."""

from collections.abc import Sequence

import torch

from tensorfork import Region

_FRONTS = (61, 512, 4096, 3)
_BACK = 67


def pattern(number: int, nbytes: int) -> torch.Tensor:
    """Pseudo-random bytes in host memory: the same for the same number, in every process."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-nbytes // 8),), dtype=torch.int64, generator=generator)
    return words.view(torch.uint8)[:nbytes]


def contents(number: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """What the regions of a `Memory` of these sizes and this number hold."""
    return [pattern(1000 * number + i, nbytes) for i, nbytes in enumerate(sizes)]


class Memory:
    """Regions of known bytes on a device, each with known bytes on both sides; most begin at odd addresses.

    `wanted` is what every byte should be; whoever lets something be written says so there.
    """

    def __init__(self, device: str, sizes: Sequence[int], number: int) -> None:
        self.device, self.sizes = device, list(sizes)
        self._fronts = [_FRONTS[i % len(_FRONTS)] for i in range(len(self.sizes))]
        self._wanted = [
            pattern(10_000_000 + i, front + nbytes + _BACK)
            for i, (front, nbytes) in enumerate(zip(self._fronts, self.sizes, strict=True))
        ]
        self._buffers = [torch.empty(wanted.numel(), dtype=torch.uint8, device=device) for wanted in self._wanted]
        for buffer, wanted in zip(self._buffers, self._wanted, strict=True):
            buffer.copy_(wanted)
        self.fill(number)

    def fill(self, number: int) -> None:
        """Put `contents(number)` into the regions, and have it there when this returns."""
        for i, new in enumerate(contents(number, self.sizes)):
            self.want(i, 0, new)
            self.read(i, 0, self.sizes[i], self._buffers).copy_(new)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def poison(self) -> None:
        """Make every byte of the regions another one: whatever is written from now on shows."""
        for i, nbytes in enumerate(self.sizes):
            self.read(i, 0, nbytes, self._wanted).bitwise_not_()
            self.read(i, 0, nbytes, self._buffers).copy_(self.read(i, 0, nbytes, self._wanted))
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    @property
    def regions(self) -> list[Region]:
        """One for each size; the ids are neither dense nor in order."""
        return [
            Region(self.id(i), buffer.data_ptr() + front, nbytes, self.device, buffer)
            for i, (buffer, front, nbytes) in enumerate(zip(self._buffers, self._fronts, self.sizes, strict=True))
        ]

    def id(self, index: int) -> int:
        """The id of a region."""
        return 7 + (index ^ 1) * 3

    def want(self, index: int, at: int, new: torch.Tensor) -> None:
        """From now on, these bytes are to be at this place."""
        self.read(index, at, new.numel(), self._wanted).copy_(new)

    def read(self, index: int, at: int, nbytes: int, where: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """A view of some bytes of a region."""
        start = self._fronts[index] + at
        return (self._buffers if where is None else where)[index][start : start + nbytes]

    def wrong(self, but: Sequence[tuple[int, int]] = ()) -> str | None:
        """In words, the first byte that is not what it should be; None if all are. `but` are stretches, as (address,
        bytes), that are not looked at.
        """
        for i, (buffer, wanted) in enumerate(zip(self._buffers, self._wanted, strict=True)):
            have = buffer.cpu()
            if torch.equal(have, wanted):
                continue
            differ = have != wanted
            for address, nbytes in but:
                start = address - buffer.data_ptr()
                differ[max(0, start) : max(0, start + nbytes)] = False
            if differ.any():
                at = int(differ.nonzero()[0])
                where = f"byte {at - self._fronts[i]:,} of region {i} ({self.sizes[i]:,} bytes)"
                return f"{where} is {int(have[at])}, not {int(wanted[at])}; {int(differ.sum()):,} bytes differ in it"
        return None
