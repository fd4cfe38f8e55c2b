"""The digest of a tensor: 64 bits, the same on CPU and GPU, against accident rather than attackers.

In words. A tensor's bytes are read in the order in which they lie (dimensions by falling stride), as little-endian
64-bit words, the last one filled up with zeros, in segments of 1024 * 1021 of them. All arithmetic is on integers
modulo 2^64, so the order of additions does not matter, and every device gets the same result. For each segment
x[0..n) three families of sums are taken:

    c[j] = sum of x[1021 i + j] over i             (columns)
    d[j] = sum of x[1031 i + j] over i             (columns of another width)
    r[i] = sum of x[1021 i + j] over j < 1021      (rows)

Each of these sums v[k], in this order, is cut into its low and its high 32 bits, taken as signed integers, and the
segment's digest is the sum of all these halves, each times a 64-bit odd pseudo-random weight of its own: the
multilinear hash of Carter and Wegman, in the form that Lemire and Kaser gave it (Strongly universal string hashing is
fast, 2014). The tensor's digest is the sum over its segments of mix(digest) * w[segment], where mix is a bijection
(two xor-shifts round a multiplication; the finaliser of Steele, Lea and Flood's SplitMix64 is the model).

Why three, and why these widths. Rows and columns see every changed, moved and exchanged word, but not four equal and
opposite changes at the corners of a rectangle: two words of one row, and two of another in the same columns. The
third family does, always: 1031 is prime, more than a row is long and more than the 1024 rows of a segment, so that no
two words of a row, and no two of a column, share one of its sums. What remains unseen within a segment needs six or
more changes that cancel out in all three families; across segments, nothing cancels out. That both widths are odd
keeps torch from splitting the sums of columns over blocks, which takes 16 MiB of scratch and more.

This is the definition, in plain torch for any device; on NVIDIA GPUs `checksum` has a kernel that computes the same.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache

import torch
from attrs import evolve, frozen

from tensorfork.digest.elements import (
    as_bytes,
    as_integers,
    by_stride,
    fill,
    gather_on_device,
    gather_on_host,
    is_dense,
)
from tensorfork.digest.sums import COLUMNS, OTHER_WIDTH, WIDTH, Sums
from tensorfork.interpreter.openmp import single_threaded

SEGMENT = 1024 * WIDTH * 8
"""Bytes of a tensor that are summed together."""
NAME = "sums3/1"
"""Names this definition on the wire: two sides compare digests only when they compute the same thing."""

_WORDS = SEGMENT // 8
_SLOTS = COLUMNS + _WORDS // WIDTH
"""A segment's sums stand in this order: columns, columns of the other width, rows."""

_Key = tuple[object, ...]
_Named = tuple[_Key, torch.Tensor]


def digests(tensors: Mapping[str, torch.Tensor], cancelled: Callable[[], bool] = lambda: False) -> dict[str, int]:
    """The digest of each tensor's elements, as an unsigned 64-bit integer, by name. Ties are computed once.

    Reads in place, with at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each
    tensor's device; the values are back on the host when this returns. Once `cancelled()` it stops between two groups
    of tensors, and returns nothing.
    """
    names: dict[_Key, list[str]] = defaultdict(list)
    by_device: dict[torch.device, dict[_Key, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        key: _Key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[key].append(name)
        by_device[tensor.device][key] = tensor
    found: dict[str, int] = {}
    with torch.inference_mode():
        for device, unique in by_device.items():
            with ExitStack() as stack:
                tuning = _TUNING.get(device.type, _TUNING["cuda"])
                if device.type == "cpu" and stack.enter_context(single_threaded()):
                    tuning = evolve(tuning, block=tuning.single_threaded)
                summing = _Summation(device, tuning)
                for _ in summing.groups(unique):
                    if cancelled():
                        return {}
                for key, value in summing.finish().items():
                    found.update(dict.fromkeys(names[key], value))
    return found


def digest(tensor: torch.Tensor) -> int:
    """The digest of one tensor."""
    return digests({"": tensor})[""]


@frozen
class _DeviceTuning:
    """How a kind of device likes its work cut, in words."""

    block: int
    """Summed at a time, and the longest operation: what a core's cache holds, and below 32,768 elements, where torch
    would wake its other threads; a whole segment where the launch is what costs."""
    single_threaded: int
    """The same where torch is kept from waking them: calls cost as much as sums."""
    stage: int
    """Scratch for tensors that are copied to be summed: misaligned, with gaps, or too small to go alone."""
    small: int
    """Tensors up to this go side by side."""
    pool: int
    """Sums that are gathered before they are mixed."""
    gather: Callable[[torch.Tensor, Sequence[torch.Tensor], int, int], None]


_TUNING = {
    "cpu": _DeviceTuning(31 * WIDTH, 110 * WIDTH, 31 * WIDTH, 31 * WIDTH, 31 * WIDTH, gather_on_host),
    "cuda": _DeviceTuning(_WORDS, _WORDS, 1 << 20, 1 << 14, 320 << 10, gather_on_device),
}


class _Summation:
    """Sums the segments of one device's tensors into slots, and mixes many of them at a time."""

    def __init__(self, device: torch.device, tuning: _DeviceTuning) -> None:
        self._device, self._tuning = device, tuning
        self._sums = Sums(tuning.block)
        self._weights = weights(_SLOTS).to(device)
        self._twice = self._weights[: 2 * WIDTH] + self._weights[2 * WIDTH : 4 * WIDTH]
        self._pool = torch.zeros(tuning.pool, dtype=torch.int64, device=device)
        self._width = 0
        self._owners: list[_Key] = []
        self._order: list[_Key] = []
        self._mixed: list[torch.Tensor] = []
        self._stage: torch.Tensor | None = None
        self._empty: list[_Key] = []

    def groups(self, tensors: Mapping[_Key, torch.Tensor]) -> Iterator[None]:
        """Sum all of them, a group at a time. Longest first, so that neighbours in time have slots of about one size;
        those with gaps or overlaps between their elements come last.
        """
        dense: dict[int, list[_Named]] = defaultdict(list)
        gapped: list[_Named] = []
        for key, tensor in tensors.items():
            nbytes = tensor.nbytes
            if not nbytes:
                self._empty.append(key)
            elif is_dense(tensor):
                dense[nbytes].append((key, tensor))
            else:
                gapped.append((key, tensor))
        for nbytes in sorted(dense, reverse=True):
            for group, step in self._together(dense[nbytes], nbytes):
                keys, members = zip(*group, strict=True)
                if step:
                    self._sum_in_place(keys, as_bytes(members[0], 0, (len(group), nbytes), (step, 1)))
                elif nbytes <= WIDTH * 8:
                    self._sum_short(keys, members, nbytes)
                else:
                    self._sum_copied(keys, members, nbytes)
                yield
        for key, tensor in gapped:
            self._sum_gapped(key, tensor)
            yield

    def finish(self) -> dict[_Key, int]:
        """Every tensor's digest."""
        self._mix()
        on_host = self._device.type == "cpu"
        mixed = self._mixed if on_host or not self._mixed else [torch.cat(self._mixed)]  # elsewhere, wait only once
        values = [value for part in mixed for value in part.tolist()]
        segments: dict[_Key, list[int]] = defaultdict(list)
        for key, value in zip(self._order, values, strict=True):
            segments[key].append(value)
        found = dict.fromkeys(self._empty, 0)
        for key, parts in segments.items():
            found[key] = sum(_mix_int(part) * _weight_int(i) for i, part in enumerate(parts)) & _MASK
        return found

    def _together(self, same: list[_Named], nbytes: int) -> Iterator[tuple[Sequence[_Named], int]]:
        """Groups of dense tensors of one length, each with the bytes from one tensor to the next where it can be read
        in place, or 0 where its tensors must be copied.
        """
        words = -(-nbytes // 8)
        most = self._tuning.pool // (words if words <= WIDTH else _width(words))
        if words > self._tuning.small:
            yield from _spaced(same, nbytes, max(1, min(most, self._tuning.block // words)))
        else:
            most = min(most, self._tuning.stage // words)
            yield from ((same[start : start + most], 0) for start in range(0, len(same), most))

    def _sum_in_place(self, keys: Sequence[_Key], matrix: torch.Tensor) -> None:
        nbytes = matrix.shape[1]
        for start in range(0, nbytes, SEGMENT):
            segment = matrix[:, start : start + SEGMENT]
            whole, tail = divmod(segment.shape[1], 8)
            slots = self._take(keys, whole + bool(tail))
            if whole:
                self._sums.add(segment[:, : whole * 8].view(torch.int64), 0, slots)
            if tail:
                last = torch.zeros(len(keys), 8, dtype=torch.uint8, device=self._device)
                last[:, :tail] = segment[:, whole * 8 :]
                self._sums.add(last.view(torch.int64), whole, slots)

    def _sum_short(self, keys: Sequence[_Key], tensors: Sequence[torch.Tensor], nbytes: int) -> None:
        """Tensors of less than a row of either width: a column is one word, and there is one row. No slots."""
        x = self._copied(tensors, 0, nbytes)
        rows = x.sum(1)
        folded = fold(x, self._twice[: 2 * x.shape[1]], self._tuning.block)
        row_weights = self._weights[2 * COLUMNS : 2 * COLUMNS + 2]
        self._mixed.append(folded.add_(fold(rows.unsqueeze(1), row_weights, self._tuning.block)))
        self._order += keys

    def _sum_copied(self, keys: Sequence[_Key], tensors: Sequence[torch.Tensor], nbytes: int) -> None:
        room = self._tuning.stage * 8
        for segment in range(0, nbytes, SEGMENT):
            end = min(segment + SEGMENT, nbytes)
            slots = self._take(keys, -(-(end - segment) // 8))
            for start in range(segment, end, room):
                x = self._copied(tensors, start, min(room, end - start))
                self._sums.add(x, (start - segment) // 8, slots)

    def _sum_gapped(self, key: _Key, tensor: torch.Tensor) -> None:
        """The tensor's elements come through the scratch, each part but the last whole rows of it."""
        stage, at = self._scratch(), _WORDS
        for filled in fill(stage.view(torch.uint8), as_integers(by_stride(tensor)), WIDTH * 8, self._tuning.block):
            words = -(-filled // 8)
            stage.view(torch.uint8)[filled : words * 8] = 0
            x = stage[:words].view(1, words)
            while x.shape[1]:
                if at == _WORDS:
                    slots, at = self._take([key], _WORDS), 0
                n = min(x.shape[1], _WORDS - at)
                self._sums.add(x[:, :n], at, slots)
                x, at = x[:, n:], at + n

    def _copied(self, tensors: Sequence[torch.Tensor], start: int, nbytes: int) -> torch.Tensor:
        """So many bytes of each dense tensor, as words in the scratch: [tensor, word]."""
        words = -(-nbytes // 8)
        rows = self._scratch()[: len(tensors) * words].view(len(tensors), words)
        if nbytes % 8:
            rows[:, -1] = 0
        self._tuning.gather(rows, tensors, start, nbytes)
        return rows

    def _scratch(self) -> torch.Tensor:
        if self._stage is None:
            self._stage = torch.empty(self._tuning.stage, dtype=torch.int64, device=self._device)
        return self._stage

    def _take(self, keys: Sequence[_Key], words: int) -> torch.Tensor:
        """Zeroed slots for one more segment, of so many words, of each key's tensor: [key, slot]."""
        width = _width(words)
        used = len(self._owners)
        if used and (not width <= self._width <= 2 * width or (used + len(keys)) * self._width > self._tuning.pool):
            self._mix()
            used = 0
        if not used:
            self._width = width
        self._owners += keys
        return self._pool[used * self._width :][: len(keys) * self._width].view(len(keys), self._width)

    def _mix(self) -> None:
        if self._owners:
            used = self._pool[: len(self._owners) * self._width].view(len(self._owners), self._width)
            self._mixed.append(fold(used, self._weights[: 2 * self._width], self._tuning.block))
            self._order += self._owners
            self._owners = []
            used.zero_()


def _width(words: int) -> int:
    """How many slots a segment of so many words has."""
    return COLUMNS + -(-words // WIDTH)


def _spaced(same: list[_Named], nbytes: int, most: int) -> Iterator[tuple[Sequence[_Named], int]]:
    """See `_Summation._together`: of long tensors, those with equal spacing in one storage, and at most so many."""
    placed = []
    for one in same:
        storage = one[1].untyped_storage().data_ptr()
        placed.append((one[1].data_ptr(), storage, one))
    placed.sort(key=lambda place: place[0])
    at = 0
    while at < len(placed):
        address, storage, one = placed[at]
        step, count = 0, 1
        if address % 8 == 0 and storage % 8 == 0:
            for before, (other, its, _) in zip(placed[at:], placed[at + 1 : at + most], strict=False):
                gap = other - before[0]
                if its != storage or gap != (step or gap) or gap % 8 or gap < nbytes:
                    break
                step, count = gap, count + 1
            step = step or -(-nbytes // 8) * 8
        yield [place[2] for place in placed[at : at + count]], step
        at += count


_ODD = 0xBF58476D1CE4E5B9
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def fold(slots: torch.Tensor, halves: torch.Tensor, most: int) -> torch.Tensor:
    """Of each row of slots [k, slot] the sum of its halves, each times its weight: [k]. No operation takes more than
    `most` elements.
    """
    step = max(1, most // halves.numel())
    return torch.cat([(part.view(torch.int32) * halves).sum(1) for part in slots.split(step)])


def mix_(words: torch.Tensor) -> torch.Tensor:
    """In place: v ^= v >>> 32; v *= odd; v ^= v >>> 29."""
    high = words >> 32
    words ^= high.bitwise_and_(0xFFFFFFFF)
    words *= _signed(_ODD)
    torch.bitwise_right_shift(words, 29, out=high)
    words ^= high.bitwise_and_((1 << 35) - 1)
    return words


def _mix_int(value: int) -> int:
    value &= _MASK
    value ^= value >> 32
    value = value * _ODD & _MASK
    return value ^ (value >> 29)


@cache
def _weight_int(index: int) -> int:
    """The odd weight of one segment, or of half a slot."""
    return _mix_int(((index + 1) * _GOLDEN) & _MASK) | 1


def weights(slots: int) -> torch.Tensor:
    """The odd weights of the first slots' halves: the low one's, then the high one's, of each."""
    state = torch.arange(1, 2 * slots + 1, dtype=torch.int64, device="cpu") * _signed(_GOLDEN)
    return mix_(state) | 1


def digest_of_words(words: Sequence[int]) -> int:
    """The digest of a tensor of 64-bit words by the definition above, word for word: what the tests compare with."""
    total = 0
    for segment in range(0, len(words), _WORDS):
        x = words[segment : segment + _WORDS]
        slots = [0] * _SLOTS
        for k, word in enumerate(x):
            slots[k % WIDTH] += word
            slots[WIDTH + k % OTHER_WIDTH] += word
            slots[COLUMNS + k // WIDTH] += word
        halves = [half for v in slots for half in (_signed_half(v), _signed_half(v >> 32))]
        value = sum(half * _weight_int(k) for k, half in enumerate(halves) if half)
        total += _mix_int(value) * _weight_int(segment // _WORDS)
    return total & _MASK


def _signed_half(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
