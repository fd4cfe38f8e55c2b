"""The digests of a whole model, by name: those of `digest`, on a GPU in few launches.

On a GPU the sums are as fast as its memory, and what costs is the launches. So tensors are summed together wherever
those of one length lie at equal distances: the experts of a layer, the layers of a model in one allocation, the
segments of a long tensor. What does not fit that (gaps between elements, odd addresses) goes the general way.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import define, field, frozen

from tensorfork import digest
from tensorfork.digest import COLUMNS, OTHER_WIDTH, SEGMENT, WIDTH
from tensorfork.memory import as_tensor

POOL = 640 << 10
"""Words of sums that are gathered on a GPU before they are mixed: 5 MiB, and as much again while they are."""

LONG = 1 << 20
"""Words of a segment for whose sums torch takes scratch, in proportion: one segment's worth of them at a time."""

Key = tuple[object, ...]


@define
class Checksums:
    """The digests of some tensors, to be computed when their bytes are there (and again when those have changed).

    What can be prepared without reading a byte is prepared when this is made: which tensors are ties, and how they are
    grouped. About 5 µs a tensor, and nothing on any GPU.
    """

    _names: dict[Key, list[str]]
    _general: dict[Key, torch.Tensor]
    _launches: dict[torch.device, list["_Launch"]]
    _keep: Sequence[torch.Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "Checksums":
        """For all these tensors."""
        names: dict[Key, list[str]] = defaultdict(list)
        general: dict[Key, torch.Tensor] = {}
        segments: dict[torch.device, list[_Segment]] = defaultdict(list)
        for i, (name, tensor) in enumerate(tensors.items()):
            if not i % 64:
                time.sleep(0)  # a seed's engine wants the interpreter too, and sooner than it would be taken away
            address, nbytes = tensor.data_ptr(), tensor.nbytes
            key: Key = (tensor.device, address, tensor.dtype, tensor.shape, tensor.stride())
            names[key].append(name)
            if len(names[key]) > 1:
                continue
            if tensor.is_cuda and nbytes and not nbytes % 8 and not address % 8 and tensor.is_contiguous():
                segments[tensor.device] += _segments(key, address, nbytes)
            else:
                general[key] = tensor
        launches = {device: list(_launches(parts)) for device, parts in segments.items()}
        return cls(dict(names), general, launches, list(tensors.values()))

    def compute(self, cancelled: Callable[[], bool] = lambda: False) -> dict[str, int]:
        """Each digest by name, as an unsigned 64-bit integer; nothing once `cancelled()`.

        At most 16 MiB of scratch on each device. Work goes to the current stream of each; the values are on the host
        when this returns.
        """
        found: dict[Key, int] = {}
        with torch.inference_mode():
            for device, launches in self._launches.items():
                sums = _Sums.on(device, launches)
                for launch in launches:
                    if cancelled():
                        return {}
                    sums.add(launch)
                found |= sums.finish()
        general = {str(i): tensor for i, tensor in enumerate(self._general.values())}
        values = digest.digests(general, cancelled)
        if len(values) < len(general):
            return {}
        found |= {key: values[str(i)] for i, key in enumerate(self._general)}
        return {name: found[key] for key, names in self._names.items() for name in names}


@frozen
class _Segment:
    """One segment of a tensor: its owner, its number in it, and where it lies."""

    key: Key
    number: int
    address: int
    words: int


@frozen
class _Launch:
    """Segments of one length on a grid of two steps: `outer` rows of `inner`, with the bytes from one to the next."""

    address: int
    words: int
    outer: int
    outer_step: int
    inner: int
    inner_step: int
    segments: Sequence[_Segment]


def _segments(key: Key, address: int, nbytes: int) -> Iterator[_Segment]:
    for number, start in enumerate(range(0, nbytes, SEGMENT)):
        yield _Segment(key, number, address + start, min(SEGMENT, nbytes - start) // 8)


def _launches(segments: Sequence[_Segment]) -> Iterator[_Launch]:
    """Group them; longest first, so that neighbours in time have slots of about one size."""
    lengths: dict[int, list[_Segment]] = defaultdict(list)
    for segment in segments:
        lengths[segment.words].append(segment)
    for words in sorted(lengths, reverse=True):
        most = max(1, min(POOL // _width(words), SEGMENT // 8 // words if words >= LONG else POOL))
        rows = list(_rows(sorted(lengths[words], key=lambda one: one.address), most))
        yield from _stacks(rows, words, most)


def _rows(sorted_segments: Sequence[_Segment], most: int) -> Iterator[list[_Segment]]:
    """Neighbours with equal spacing, at most so many."""
    row: list[_Segment] = []
    for segment in sorted_segments:
        if len(row) == most or (
            len(row) > 1 and segment.address - row[-1].address != row[-1].address - row[-2].address
        ):
            yield row
            row = []
        row.append(segment)
    if row:
        yield row


def _stacks(rows: Sequence[list[_Segment]], words: int, most: int) -> Iterator[_Launch]:
    """Rows that are alike, with equal spacing, are one launch."""
    at = 0
    while at < len(rows):
        row = rows[at]
        inner_step = row[1].address - row[0].address if len(row) > 1 else 0
        outer, outer_step = 1, 0
        while at + outer < len(rows) and (outer + 1) * len(row) <= most:
            other = rows[at + outer]
            step = other[0].address - rows[at + outer - 1][0].address
            alike = len(other) == len(row) and (len(row) == 1 or other[1].address - other[0].address == inner_step)
            if not alike or (outer_step and step != outer_step):
                break
            outer, outer_step = outer + 1, step
        members = [segment for one in rows[at : at + outer] for segment in one]
        yield _Launch(row[0].address, words, outer, outer_step, len(row), inner_step, members)
        at += outer


def _width(words: int) -> int:
    return COLUMNS + -(-words // WIDTH)


@define
class _Sums:
    """Sums launches into slots on one GPU, and mixes many at a time."""

    device: torch.device
    window: torch.Tensor
    """All of the tensors' memory and what lies between, as words; only the tensors' own are ever read."""
    origin: int
    pool: torch.Tensor
    weights: torch.Tensor
    width: int = 0
    waiting: list[_Segment] = field(factory=list)
    sums: list[torch.Tensor] = field(factory=list)
    order: list[_Segment] = field(factory=list)

    @classmethod
    def on(cls, device: torch.device, launches: Sequence[_Launch]) -> "_Sums":
        segments = [segment for launch in launches for segment in launch.segments]
        origin = min(segment.address for segment in segments)
        end = max(segment.address + segment.words * 8 for segment in segments)
        widest = max(_width(launch.words) * len(launch.segments) for launch in launches)
        pool = torch.empty(max(POOL, widest), dtype=torch.int64, device=device)
        weights = digest.weights(max(_width(launch.words) for launch in launches)).to(device)
        return cls(device, as_tensor(origin, end - origin, device).view(torch.int64), origin, pool, weights)

    def add(self, launch: _Launch) -> None:
        """Enqueue one launch's sums."""
        n, slots = launch.words, self._take(launch)
        start, w = (launch.address - self.origin) // 8, self.width
        grid, steps = (launch.outer, launch.inner), (launch.outer_step // 8, launch.inner_step // 8)
        out_steps = (launch.inner * w, w)
        for width, column in ((WIDTH, 0), (OTHER_WIDTH, WIDTH)):
            rows, left = divmod(n, width)
            if rows:
                x = self.window.as_strided((*grid, rows, width), (*steps, width, 1), start)
                out = self.pool.as_strided((*grid, width), (*out_steps, 1), slots + column)
                torch.sum(x, 2, out=out)
                if width == WIDTH:
                    torch.sum(x, 3, out=self.pool.as_strided((*grid, rows), (*out_steps, 1), slots + COLUMNS))
            else:
                self.pool.as_strided((*grid, width), (*out_steps, 1), slots + column).zero_()
            if left:
                rest = self.window.as_strided((*grid, left), (*steps, 1), start + rows * width)
                self.pool.as_strided((*grid, left), (*out_steps, 1), slots + column).add_(rest)
                if width == WIDTH:
                    torch.sum(rest, 2, out=self.pool.as_strided(grid, out_steps, slots + COLUMNS + rows))

    def finish(self) -> dict[Key, int]:
        """Every tensor's digest."""
        self._mix()
        values = [value for part in self.sums for value in part.tolist()]
        weights = digest.weights(max(segment.number for segment in self.order) + 1)
        segments = torch.tensor(values, dtype=torch.int64)
        numbers = torch.tensor([segment.number for segment in self.order])
        found: dict[Key, int] = defaultdict(int)
        for segment, value in zip(self.order, _mixed(segments).mul_(weights[numbers]).tolist(), strict=True):
            found[segment.key] += value
        return {key: value % (1 << 64) for key, value in found.items()}

    def _take(self, launch: _Launch) -> int:
        """Where in the pool the launch's slots begin; mixes what is there when they do not fit with it."""
        width, count = _width(launch.words), len(launch.segments)
        fits = width <= self.width <= 2 * width and (len(self.waiting) + count) * self.width <= len(self.pool)
        if self.waiting and not fits:
            self._mix()
        if not self.waiting:
            self.width = width
        at = len(self.waiting) * self.width
        self.waiting += launch.segments
        if width < self.width:  # the rows it lacks
            self.pool.as_strided((count, self.width - width), (self.width, 1), at + width).zero_()
        return at

    def _mix(self) -> None:
        if self.waiting:
            used = self.pool[: len(self.waiting) * self.width].view(len(self.waiting), self.width)
            self.sums.append(_mixed(used).mul_(self.weights[: self.width]).sum(1))
            self.order += self.waiting
            self.waiting = []


def _mixed(words: torch.Tensor) -> torch.Tensor:
    return digest.mix_(words, torch.empty_like(words))
