"""The digests of a whole model, by name: those of `digest`, on a GPU in few launches.

On a GPU the sums are as fast as its memory; what costs is each launch, and each kernel's first (CUDA loads it then). So
segments are summed together wherever those of one length lie at equal distances, as those of a long tensor, the experts
of a layer and the layers of a model do, and everything is made of two kernels, a sum and a product. What does not fit
that (gaps between elements, odd addresses) goes the general way.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import define, frozen

from tensorfork import digest
from tensorfork.digest import COLUMNS, OTHER_WIDTH, SEGMENT, WIDTH
from tensorfork.memory import as_tensor

POOL = 320 << 10
"""Words of sums that one launch may leave on a GPU: 2.6 MB, and four times as much while they are folded."""

Key = tuple[object, ...]
_Spot = tuple[int, int, int]
"""Where a segment lies: its address, the number of its tensor, and its own in that."""


@define
class Checksums:
    """The digests of some tensors, to be computed when their bytes are there (and again when those have changed).

    What can be prepared without reading a byte is prepared when this is made: which tensors are ties, and how they are
    grouped. Nothing is done on any GPU.
    """

    _names: list[list[str]]
    """Of each tensor; several, where it is tied."""
    _general: dict[int, torch.Tensor]
    _launches: dict[torch.device, list["_Launch"]]
    _keep: Sequence[torch.Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Checksums":
        """For all these tensors."""
        known: dict[Key, int] = {}
        names: list[list[str]] = []
        general: dict[int, torch.Tensor] = {}
        spots: dict[torch.device, dict[int, list[_Spot]]] = defaultdict(lambda: defaultdict(list))
        for i, (name, tensor) in enumerate(tensors.items()):
            if not i % 64:
                time.sleep(0)  # a seed's engine wants the interpreter too, and sooner than it would be taken away
            address, nbytes = tensor.data_ptr(), tensor.nbytes
            key: Key = (tensor.device, address, tensor.dtype, tensor.shape, tensor.stride())
            number = known.setdefault(key, len(names))
            if number < len(names):
                names[number].append(name)
                continue
            names.append([name])
            if tensor.is_cuda and nbytes and not nbytes % 8 and not address % 8 and tensor.is_contiguous():
                lengths = spots[tensor.device]
                for segment, start in enumerate(range(0, nbytes, SEGMENT)):
                    lengths[min(SEGMENT, nbytes - start) // 8].append((address + start, number, segment))
            else:
                general[number] = tensor
        launches = {device: list(_launches(lengths)) for device, lengths in spots.items()}
        return cls(names, general, launches, list(tensors.values()))

    def compute(self, cancelled: Callable[[], bool] = lambda: False) -> dict[str, int]:
        """Each digest by name, as an unsigned 64-bit integer; nothing once `cancelled()`.

        At most 16 MiB of scratch on each device. Work goes to the current stream of each; the values are on the host
        when this returns.
        """
        found = torch.zeros(len(self._names), dtype=torch.int64, device="cpu")
        with torch.inference_mode():
            for device, launches in self._launches.items():
                sums = _Sums.on(device, launches)
                for launch in launches:
                    if cancelled():
                        return {}
                    sums.add(launch)
                sums.finish(launches, found)
        general = digest.digests({str(number): tensor for number, tensor in self._general.items()}, cancelled)
        if len(general) < len(self._general):
            return {}
        values = dict(enumerate(found.tolist())) | {int(number): value for number, value in general.items()}
        return {name: values[i] % (1 << 64) for i, names in enumerate(self._names) for name in names}


@frozen(eq=False)
class _Launch:
    """Segments of one length on a grid of two steps: `outer` rows of `inner`, with the bytes from one to the next."""

    address: int
    words: int
    outer: int
    outer_step: int
    inner: int
    inner_step: int
    tensors: torch.Tensor
    """Of each segment, the number of its tensor, and (below) its own in that."""
    numbers: torch.Tensor

    @property
    def count(self) -> int:
        """Segments."""
        return self.outer * self.inner

    @property
    def end(self) -> int:
        """The address behind the last."""
        outer, inner = (self.outer - 1) * self.outer_step, (self.inner - 1) * self.inner_step
        return self.address + outer + inner + self.words * 8


def _launches(lengths: Mapping[int, list[_Spot]]) -> Iterator[_Launch]:
    for words in sorted(lengths, reverse=True):
        most = max(1, POOL // _width(words))
        yield from _stacks(list(_rows(sorted(lengths[words]), most)), words, most)


def _rows(spots: Sequence[_Spot], most: int) -> Iterator[list[_Spot]]:
    """Neighbours with equal spacing, at most so many."""
    row: list[_Spot] = []
    for spot in spots:
        if len(row) == most or (len(row) > 1 and spot[0] - row[-1][0] != row[-1][0] - row[-2][0]):
            yield row
            row = []
        row.append(spot)
    if row:
        yield row


def _stacks(rows: Sequence[list[_Spot]], words: int, most: int) -> Iterator[_Launch]:
    """Rows that are alike, with equal spacing, are one launch."""
    at = 0
    while at < len(rows):
        row = rows[at]
        inner_step = row[1][0] - row[0][0] if len(row) > 1 else 0
        outer, outer_step = 1, 0
        while at + outer < len(rows) and (outer + 1) * len(row) <= most:
            other = rows[at + outer]
            step = other[0][0] - rows[at + outer - 1][0][0]
            alike = len(other) == len(row) and (len(row) == 1 or other[1][0] - other[0][0] == inner_step)
            if not alike or (outer_step and step != outer_step):
                break
            outer, outer_step = outer + 1, step
        _, tensors, numbers = zip(*(spot for one in rows[at : at + outer] for spot in one), strict=True)
        yield _Launch(
            row[0][0], words, outer, outer_step, len(row), inner_step, torch.tensor(tensors), torch.tensor(numbers)
        )
        at += outer


def _width(words: int) -> int:
    return COLUMNS + -(-words // WIDTH)


@define(eq=False)
class _Sums:
    """Sums launches on one GPU, and folds each one's sums into a value for each of its segments."""

    window: torch.Tensor
    """All of the tensors' memory and what lies between, as words; only the tensors' own are ever read."""
    origin: int
    pool: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor
    used: int = 0

    @classmethod
    def on(cls, device: torch.device, launches: Sequence[_Launch]) -> "_Sums":
        origin = min(launch.address for launch in launches)
        window = as_tensor(origin, max(launch.end for launch in launches) - origin, device).view(torch.int64)
        pool = torch.empty(max(_width(one.words) * one.count for one in launches) * 2, dtype=torch.int64, device=device)
        weights = digest.weights(max(_width(launch.words) for launch in launches)).to(device)
        values = torch.empty(sum(launch.count for launch in launches), dtype=torch.int64, device=device)
        return cls(window, origin, pool, weights, values)

    def add(self, launch: _Launch) -> None:
        """Enqueue one launch's sums."""
        n, width = launch.words, _width(launch.words)
        rest = n % WIDTH or n % OTHER_WIDTH
        # Sums of whole rows, and what is left behind them, stand one behind the other, and are added up by a sum.
        slots = self.pool[: launch.count * width * (2 if rest else 1)]
        steps = (launch.inner * width, width, 1)
        if rest:
            slots.zero_()
            self._sum_rests(launch, launch.count * width, steps)
        elif n < OTHER_WIDTH:
            slots.zero_()
        self._sum_rows(launch, steps)
        if rest:
            slots = torch.sum(slots.view(2, -1), 0)
        halves = slots.view(launch.count, width).view(torch.int32) * self.weights[: 2 * width]
        torch.sum(halves, 1, out=self.values[self.used : self.used + launch.count])
        self.used += launch.count

    def finish(self, launches: Sequence[_Launch], found: torch.Tensor) -> None:
        """Add what the segments make to their tensors' digests, on the host."""
        parts = digest.combine(self.values.cpu(), torch.cat([launch.numbers for launch in launches]))
        found.index_add_(0, torch.cat([launch.tensors for launch in launches]), parts)

    def _sum_rows(self, launch: _Launch, steps: tuple[int, int, int]) -> None:
        for width, column in ((WIDTH, 0), (OTHER_WIDTH, WIDTH)):
            if rows := launch.words // width:
                x = self._words(launch, 0, rows, width)
                torch.sum(x, 2, out=self._slots(launch, steps, column, width))
                if width == WIDTH:
                    torch.sum(x, 3, out=self._slots(launch, steps, COLUMNS, rows))

    def _sum_rests(self, launch: _Launch, behind: int, steps: tuple[int, int, int]) -> None:
        for width, column in ((WIDTH, 0), (OTHER_WIDTH, WIDTH)):
            rows, left = divmod(launch.words, width)
            if left:
                x = self._words(launch, rows * width, 1, left)
                torch.sum(x, 2, out=self._slots(launch, steps, behind + column, left))  # of one row: a copy
                if width == WIDTH:
                    torch.sum(x, 3, out=self._slots(launch, steps, behind + COLUMNS + rows, 1))

    def _words(self, launch: _Launch, start: int, rows: int, width: int) -> torch.Tensor:
        """Of each segment so many rows from a word on: [outer, inner, row, word]."""
        steps = (launch.outer_step // 8, launch.inner_step // 8, width, 1)
        at = (launch.address - self.origin) // 8 + start
        return self.window.as_strided((launch.outer, launch.inner, rows, width), steps, at)

    def _slots(self, launch: _Launch, steps: tuple[int, int, int], at: int, count: int) -> torch.Tensor:
        """Of each segment so many slots: [outer, inner, slot]."""
        return self.pool.as_strided((launch.outer, launch.inner, count), steps, at)
