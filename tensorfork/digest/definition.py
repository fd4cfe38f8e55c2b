"""The digest of a tensor: 64 bits, the same on CPU and GPU. It guards against accidents, not against attackers.

The definition. A tensor's bytes are read in the order in which they lie in memory (dimensions by falling stride), as
little-endian 64-bit words, the last one padded with zeros, in segments of 1024 * 1021 words. Elements that
expanding or sliding windows repeat are read once (`elements.read_once`). All arithmetic is on
integers modulo 2^64, so the order of additions does not matter, and every device gets the same result. For each segment
x[0..n) three families of sums are taken:

    c[j] = sum of x[1021 i + j] over i             (columns)
    d[j] = sum of x[1031 i + j] over i             (columns at another width)
    r[i] = sum of x[1021 i + j] over j < 1021      (rows)

Each of these sums, in this order, is split into its low and its high 32 bits, taken as signed integers. The segment's
digest is the sum of all these halves, each times a 64-bit odd pseudo-random weight of its own: the multilinear hash of
Carter and Wegman, in the form that Lemire and Kaser gave it (Strongly universal string hashing is fast, 2014). The
tensor's digest is the sum over its segments of mix(digest) * w[segment], where mix is a bijection (two xor-shifts
around a multiplication, after the finaliser of Steele, Lea and Flood's SplitMix64).

Why three families, and these widths. Rows and columns detect every changed, moved and exchanged word, but not four
equal and opposite changes at the corners of a rectangle: two words of one row, and two of another in the same columns.
The third family always detects those: 1031 is prime, and larger than the length of a row and than the 1024 rows of a
segment, so no two words of a row, and no two of a column, share one of its sums. A change within a segment that is not
detected needs six or more words whose changes cancel out in all three families; across segments, nothing cancels out.
Both widths are odd because torch then does not split the sums of columns over blocks, which takes 16 MiB of scratch
and more.

This module computes it in plain torch on any device; `batch` does so with a kernel on NVIDIA GPUs.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache

import torch
from attrs import evolve, frozen

from tensorfork.digest.elements import as_bytes, copy_elements, is_dense, read_once
from tensorfork.digest.reads import CheckedReads, HostReads, TorchReads
from tensorfork.digest.sums import COLUMNS, OTHER_WIDTH, WIDTH, SegmentSums
from tensorfork.interpreter import ending
from tensorfork.interpreter.openmp import single_threaded

SEGMENT = 1024 * WIDTH * 8
"""Bytes of a tensor that are summed together."""
NAME = "sums3/2"
"""Names this definition on the wire: two sides compare digests only when they compute the same thing."""

_WORDS = SEGMENT // 8
_SUMS = COLUMNS + _WORDS // WIDTH
"""Sums of a full segment, in this order: columns, columns of the other width, rows."""

_CHECK_EVERY = 256
"""Tensors between two checks whether to go on, where nothing of them is read."""

_Key = tuple[object, ...]
_Keyed = tuple[_Key, torch.Tensor]


def digests(
    tensors: Mapping[str, torch.Tensor], cancelled: Callable[[], bool] = lambda: False, *, checked_reads: bool = False
) -> dict[str, int]:
    """The digest of each tensor's elements, as an unsigned 64-bit integer, by name. Ties are computed once.

    Reads in place, with at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each
    tensor's device; the values are back on the host when this returns. Checks `cancelled` every 8 MB at least; once
    that is true, returns nothing. For `checked_reads` see `batch.DigestBatch.compute`.
    """

    def check() -> None:
        ending.check()
        if cancelled():
            raise _Cancelled

    try:
        return _digests(tensors, check, checked_reads)
    except _Cancelled:
        return {}


class _Cancelled(Exception):
    pass


def _digests(tensors: Mapping[str, torch.Tensor], check: Callable[[], None], checked_reads: bool) -> dict[str, int]:
    names: dict[_Key, list[str]] = defaultdict(list)
    by_device: dict[torch.device, dict[_Key, torch.Tensor]] = defaultdict(dict)
    for i, (name, tensor) in enumerate(tensors.items()):
        if not i % _CHECK_EVERY:
            check()
        key: _Key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[key].append(name)
        by_device[tensor.device][key] = read_once(tensor)
    found: dict[str, int] = {}
    with torch.inference_mode():
        for device, unique in by_device.items():
            with ExitStack() as stack:
                kind = "cpu, checked" if checked_reads and device.type == "cpu" else device.type
                tuning = _TUNING.get(kind, _TUNING["cuda"])
                if device.type == "cpu" and stack.enter_context(single_threaded()):
                    block = tuning.single_threaded_block
                    tuning = evolve(tuning, block=block, scratch=block)
                computation = _DeviceDigests(device, tuning, check)
                computation.add_groups(unique)
                for key, value in computation.finish().items():
                    found.update(dict.fromkeys(names[key], value))
    return found


def digest(tensor: torch.Tensor) -> int:
    """The digest of one tensor."""
    return digests({"": tensor})[""]


@frozen(eq=False, repr=False)
class _DeviceTuning:
    """How the work is divided on one kind of device. Sizes are in words."""

    block: int
    """Summed at a time, and the longest operation: what fits into a core's cache, and less than the 32,768 elements at
    which torch would wake its other threads. A whole segment where the launch is what costs."""
    single_threaded_block: int
    """The same where torch is kept on one thread: larger, so that calls cost less beside sums."""
    scratch: int
    """Scratch for tensors that are copied before they are summed: misaligned, with gaps, or small."""
    small: int
    """Tensors up to this size are copied and summed side by side."""
    pool: int
    """Sums that are collected before they are folded into digests."""
    reads: Callable[[torch.device], TorchReads]
    """How tensors are read that are copied."""


_TUNING = {
    "cpu": _DeviceTuning(31 * WIDTH, 110 * WIDTH, 31 * WIDTH, 31 * WIDTH, 31 * WIDTH, HostReads),
    "cpu, checked": _DeviceTuning(31 * WIDTH, 256 * WIDTH, 31 * WIDTH, sys.maxsize, 31 * WIDTH, CheckedReads),
    "cuda": _DeviceTuning(_WORDS, _WORDS, 1 << 20, 1 << 14, 320 << 10, TorchReads),
}
"""256 rows of words nearly fill a huge page."""


class _DeviceDigests:
    """Computes the digests of one device's tensors: sums their segments into a pool, and folds many at a time."""

    def __init__(self, device: torch.device, tuning: _DeviceTuning, check: Callable[[], None]) -> None:
        self._check = check
        """Called before each group of tensors, segment and slab; raises to cancel."""
        self._device, self._tuning, self._reads = device, tuning, tuning.reads(device)
        self._adder = SegmentSums(tuning.block)
        self._weights = half_weights(_SUMS).to(device)
        self._short_weights = self._weights[: 2 * WIDTH] + self._weights[2 * WIDTH : 4 * WIDTH]
        self._pool = torch.zeros(tuning.pool, dtype=torch.int64, device=device)
        self._pool_width = 0
        """Sums in each row of the pool. A row is for one segment."""
        self._pool_keys: list[_Key] = []
        """The tensor of each used row."""
        self._folded: list[torch.Tensor] = []
        self._folded_keys: list[_Key] = []
        """The tensor of each segment digest in `_folded`, in order."""
        self._scratch: torch.Tensor | None = None
        self._empty: list[_Key] = []

    def add_groups(self, tensors: Mapping[_Key, torch.Tensor]) -> None:
        """Sum all of them, a group at a time.

        Longest first, so that segments that share the pool have about equally many sums. Tensors with gaps or overlaps
        between their elements come last.
        """
        dense: dict[int, list[_Keyed]] = defaultdict(list)
        gapped: list[_Keyed] = []
        for key, tensor in tensors.items():
            nbytes = tensor.nbytes
            if not nbytes:
                self._empty.append(key)
            elif is_dense(tensor):
                dense[nbytes].append((key, tensor))
            else:
                gapped.append((key, tensor))
        for nbytes in sorted(dense, reverse=True):
            for group, spacing in self._groups(dense[nbytes], nbytes):
                self._check()
                keys, members = zip(*group, strict=True)
                if spacing:
                    self._sum_in_place(keys, as_bytes(members[0], 0, (len(group), nbytes), (spacing, 1)))
                elif nbytes <= WIDTH * 8:
                    self._sum_short(keys, members, nbytes)
                else:
                    self._sum_copied(keys, members, nbytes)
        for key, tensor in gapped:
            self._sum_gapped(key, tensor)

    def finish(self) -> dict[_Key, int]:
        """Every tensor's digest."""
        self._fold_pool()
        on_host = self._device.type == "cpu"
        folded = self._folded if on_host or not self._folded else [torch.cat(self._folded)]  # one wait for a GPU
        values = [value for part in folded for value in part.tolist()]
        segments: dict[_Key, list[int]] = defaultdict(list)
        for key, value in zip(self._folded_keys, values, strict=True):
            segments[key].append(value)
        found = dict.fromkeys(self._empty, 0)
        for key, parts in segments.items():
            found[key] = sum(_mix_int(part) * _weight_int(i) for i, part in enumerate(parts)) & _MASK
        return found

    def _groups(self, same_size: list[_Keyed], nbytes: int) -> Iterator[tuple[Sequence[_Keyed], int]]:
        """Groups of dense tensors of one size. With each, the bytes from one tensor to the next where the group can be
        read in place, or 0 where its tensors must be copied.
        """
        words = -(-nbytes // 8)
        most = self._tuning.pool // (words if words <= WIDTH else _count_sums(words))
        if words > self._tuning.small:
            yield from _evenly_spaced(same_size, nbytes, max(1, min(most, self._tuning.block // words)))
        else:
            most = max(1, min(most, self._tuning.scratch // words))
            yield from ((same_size[start : start + most], 0) for start in range(0, len(same_size), most))

    def _sum_in_place(self, keys: Sequence[_Key], rows: torch.Tensor) -> None:
        """Sum tensors that are the rows of a view of bytes [tensor, byte]."""
        nbytes = rows.shape[1]
        for start in range(0, nbytes, SEGMENT):
            self._check()
            segment = rows[:, start : start + SEGMENT]
            whole, tail = divmod(segment.shape[1], 8)
            sums = self._new_sums(keys, whole + bool(tail))
            if whole:
                self._adder.add(segment[:, : whole * 8].view(torch.int64), 0, sums)
            if tail:
                last = torch.zeros(len(keys), 8, dtype=torch.uint8, device=self._device)
                last[:, :tail] = segment[:, whole * 8 :]
                self._adder.add(last.view(torch.int64), whole, sums)

    def _sum_short(self, keys: Sequence[_Key], tensors: Sequence[torch.Tensor], nbytes: int) -> None:
        """Digest tensors of at most one row of `WIDTH` directly: each word is a column of either width, and there is
        one row.
        """
        x = self._copied(tensors, 0, nbytes)
        rows = x.sum(1)
        folded = fold(x, self._short_weights[: 2 * x.shape[1]], self._tuning.block)
        row_weights = self._weights[2 * COLUMNS : 2 * COLUMNS + 2]
        self._folded.append(folded.add_(fold(rows.unsqueeze(1), row_weights, self._tuning.block)))
        self._folded_keys += keys

    def _sum_copied(self, keys: Sequence[_Key], tensors: Sequence[torch.Tensor], nbytes: int) -> None:
        """Sum dense tensors of one size through the scratch."""
        most = self._tuning.scratch * 8
        for segment in range(0, nbytes, SEGMENT):
            self._check()
            end = min(segment + SEGMENT, nbytes)
            sums = self._new_sums(keys, -(-(end - segment) // 8))
            for start in range(segment, end, most):
                x = self._copied(tensors, start, min(most, end - start))
                self._adder.add(x, (start - segment) // 8, sums)

    def _sum_gapped(self, key: _Key, tensor: torch.Tensor) -> None:
        """Sum a tensor with gaps or overlaps through the scratch, in parts of whole rows but for the last."""
        scratch, at = self._get_scratch(), _WORDS
        as_uint8 = scratch.view(torch.uint8)
        most = min(self._tuning.scratch * 4 // tensor.element_size(), self._tuning.block)
        slabs = self._checked(self._reads.slabs(tensor, most))
        for filled in copy_elements(as_uint8, slabs, WIDTH * 8):
            words = -(-filled // 8)
            as_uint8[filled : words * 8] = 0
            x = scratch[:words].view(1, words)
            while x.shape[1]:
                if at == _WORDS:
                    sums, at = self._new_sums([key], _WORDS), 0
                n = min(x.shape[1], _WORDS - at)
                self._adder.add(x[:, :n], at, sums)
                x, at = x[:, n:], at + n

    def _checked(self, parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in parts:
            self._check()
            yield part

    def _copied(self, tensors: Sequence[torch.Tensor], start: int, nbytes: int) -> torch.Tensor:
        """`nbytes` bytes of each dense tensor from byte `start` on, as words in the scratch: [tensor, word]."""
        words = -(-nbytes // 8)
        rows = self._get_scratch()[: len(tensors) * words].view(len(tensors), words)
        if nbytes % 8:
            rows[:, -1] = 0
        self._reads.gather(rows, tensors, start, nbytes)
        return rows

    def _get_scratch(self) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = self._reads.new_scratch(self._tuning.scratch)
        return self._scratch

    def _new_sums(self, keys: Sequence[_Key], words: int) -> torch.Tensor:
        """Zeroed sums for one more segment, of `words` words, of each key's tensor: [key, sum]."""
        width = _count_sums(words)
        used = len(self._pool_keys)
        fits = width <= self._pool_width <= 2 * width and (used + len(keys)) * self._pool_width <= self._tuning.pool
        if used and not fits:
            self._fold_pool()
            used = 0
        if not used:
            self._pool_width = width
        self._pool_keys += keys
        return self._pool[used * self._pool_width :][: len(keys) * self._pool_width].view(len(keys), self._pool_width)

    def _fold_pool(self) -> None:
        """Fold each segment's sums into its digest, and empty the pool."""
        if self._pool_keys:
            count, width = len(self._pool_keys), self._pool_width
            used = self._pool[: count * width].view(count, width)
            self._folded.append(fold(used, self._weights[: 2 * width], self._tuning.block))
            self._folded_keys += self._pool_keys
            self._pool_keys = []
            used.zero_()


def _count_sums(words: int) -> int:
    """How many sums a segment of so many words has."""
    return COLUMNS + -(-words // WIDTH)


def _evenly_spaced(same_size: list[_Keyed], nbytes: int, most: int) -> Iterator[tuple[Sequence[_Keyed], int]]:
    """See `_DeviceDigests._groups`: of long tensors, at most `most` that follow at equal spacing in one storage."""
    placed = []
    for keyed in same_size:
        storage = keyed[1].untyped_storage().data_ptr()
        placed.append((keyed[1].data_ptr(), storage, keyed))
    placed.sort(key=lambda place: place[0])
    at = 0
    while at < len(placed):
        address, storage, _ = placed[at]
        spacing, count = 0, 1
        if address % 8 == 0 and storage % 8 == 0:
            for before, (other, its_storage, _) in zip(placed[at:], placed[at + 1 : at + most], strict=False):
                gap = other - before[0]
                if its_storage != storage or gap != (spacing or gap) or gap % 8 or gap < nbytes:
                    break
                spacing, count = gap, count + 1
            spacing = spacing or -(-nbytes // 8) * 8
        yield [place[2] for place in placed[at : at + count]], spacing
        at += count


_ODD = 0xBF58476D1CE4E5B9
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def fold(sums: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
    """For each row of sums [k, sum], the sum of their 32-bit halves, each times its weight: [k]. No operation takes
    more than `most` elements.
    """
    step = max(1, most // weights.numel())
    return torch.cat([(part.view(torch.int32) * weights).sum(1) for part in sums.split(step)])


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
    """The odd weight of one segment, or of half a sum."""
    return _mix_int(((index + 1) * _GOLDEN) & _MASK) | 1


def half_weights(count: int) -> torch.Tensor:
    """The odd weights of the halves of the first `count` sums: of each, the low half's, then the high half's."""
    state = torch.arange(1, 2 * count + 1, dtype=torch.int64, device="cpu") * _signed(_GOLDEN)
    return mix_(state) | 1


def digest_of_words(words: Sequence[int]) -> int:
    """The digest of a tensor of 64-bit words by the definition above, word for word. Slow: tests compare with it."""
    total = 0
    for segment in range(0, len(words), _WORDS):
        x = words[segment : segment + _WORDS]
        sums = [0] * _SUMS
        for k, word in enumerate(x):
            sums[k % WIDTH] += word
            sums[WIDTH + k % OTHER_WIDTH] += word
            sums[COLUMNS + k // WIDTH] += word
        halves = [half for v in sums for half in (_signed_half(v), _signed_half(v >> 32))]
        value = sum(half * _weight_int(k) for k, half in enumerate(halves) if half)
        total += _mix_int(value) * _weight_int(segment // _WORDS)
    return total & _MASK


def _signed_half(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
