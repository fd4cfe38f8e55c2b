"""Digests in plain torch, on any device. `definition` says what they are."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from attrs import evolve, frozen

from tensorfork.digest.definition import GOLDEN, MASK, ODD, PIECE, Pieces
from tensorfork.digest.elements import as_bytes, copy_elements, is_dense, read_once
from tensorfork.digest.reads import CheckedReads, HostReads, TorchReads
from tensorfork.digest.sums import COLUMNS, WIDTH, PieceSums
from tensorfork.interpreter import ending
from tensorfork.interpreter.openmp import single_threaded

_CHECK_EVERY = 256
"""Tensors between two checks whether to go on, where nothing of them is read."""

_Key = tuple[object, ...]
_Keyed = tuple[_Key, torch.Tensor]


def compute(
    tensors: Mapping[str, torch.Tensor],
    cancelled: Callable[[], bool] = lambda: False,
    *,
    checked_reads: bool = False,
    piece: int = PIECE,
) -> dict[str, Pieces]:
    """The digests of each tensor's pieces, by name. Ties are computed once.

    Reads in place, with at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each
    tensor's device; the values are back on the host when this returns. Checks `cancelled` every 8 MiB at least; once
    that is true, returns nothing. For `checked_reads` see `batch.DigestBatch.pieces`. `piece` stands for PIECE, in
    tests; it is a multiple of 8, and has a row of words at least.
    """

    def check() -> None:
        ending.check()
        if cancelled():
            raise _Cancelled

    try:
        return _compute(tensors, check, checked_reads, piece)
    except _Cancelled:
        return {}


class _Cancelled(Exception):
    pass


def _compute(
    tensors: Mapping[str, torch.Tensor], check: Callable[[], None], checked_reads: bool, piece: int
) -> dict[str, Pieces]:
    names: dict[_Key, list[str]] = defaultdict(list)
    by_device: dict[torch.device, dict[_Key, torch.Tensor]] = defaultdict(dict)
    for i, (name, tensor) in enumerate(tensors.items()):
        if not i % _CHECK_EVERY:
            check()
        key: _Key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[key].append(name)
        by_device[tensor.device][key] = read_once(tensor)
    found: dict[str, Pieces] = {}
    with torch.inference_mode():
        for device, unique in by_device.items():
            with ExitStack() as stack:
                kind = "cpu, checked" if checked_reads and device.type == "cpu" else device.type
                tuning = _TUNING.get(kind, _TUNING["cuda"])
                if device.type == "cpu" and stack.enter_context(single_threaded()):
                    block = tuning.single_threaded_block
                    tuning = evolve(tuning, block=block, scratch=block)
                computation = _DeviceDigests(device, tuning, check, piece)
                computation.add_groups(unique)
                for key, pieces in computation.finish().items():
                    found.update(dict.fromkeys(names[key], pieces))
    return found


@frozen(eq=False, repr=False)
class _DeviceTuning:
    """How the work is divided on one kind of device. Sizes are in words."""

    block: int
    """Summed at a time, and the longest operation: what fits into a core's cache, and less than the 32,768 elements at
    which torch would wake its other threads. A whole piece where the launch is what costs."""
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
    "cpu, checked": _DeviceTuning(31 * WIDTH, 257 * WIDTH, 31 * WIDTH, sys.maxsize, 31 * WIDTH, CheckedReads),
    "cuda": _DeviceTuning(PIECE // 8, PIECE // 8, PIECE // 8, 1 << 14, 320 << 10, TorchReads),
}
"""A piece has 1028 rows of words, four times 257."""


class _DeviceDigests:
    """Computes the digests of one device's tensors: sums their pieces into a pool, and folds many at a time."""

    def __init__(self, device: torch.device, tuning: _DeviceTuning, check: Callable[[], None], piece: int) -> None:
        self._check = check
        """Called before each group of tensors, piece and slab; raises to cancel."""
        self._piece = piece
        self._device, self._tuning, self._reads = device, tuning, tuning.reads(device)
        self._adder = PieceSums(tuning.block)
        self._weights = _half_weights(_count_sums(piece // 8)).to(device)
        self._short_weights = self._weights[: 2 * WIDTH] + self._weights[2 * WIDTH : 4 * WIDTH]
        self._pool = torch.zeros(tuning.pool, dtype=torch.int64, device=device)
        self._pool_width = 0
        """Sums in each row of the pool. A row is for one piece."""
        self._pool_keys: list[_Key] = []
        """The tensor of each used row."""
        self._folded: list[torch.Tensor] = []
        self._folded_keys: list[_Key] = []
        """The tensor of each piece digest in `_folded`, in order."""
        self._scratch: torch.Tensor | None = None
        self._empty: list[_Key] = []

    def add_groups(self, tensors: Mapping[_Key, torch.Tensor]) -> None:
        """Sum all of them, a group at a time.

        Longest first, so that pieces that share the pool have about equally many sums. Tensors with gaps or overlaps
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

    def finish(self) -> dict[_Key, Pieces]:
        """The pieces of every tensor."""
        self._fold_pool()
        on_host = self._device.type == "cpu"
        folded = self._folded if on_host or not self._folded else [torch.cat(self._folded)]  # one wait for a GPU
        values = [value for part in folded for value in part.tolist()]
        found: dict[_Key, list[int]] = {key: [] for key in self._empty}
        for key, value in zip(self._folded_keys, values, strict=True):
            found.setdefault(key, []).append(value & MASK)
        return {key: tuple(pieces) for key, pieces in found.items()}

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
        for start in range(0, nbytes, self._piece):
            self._check()
            piece = rows[:, start : start + self._piece]
            whole, tail = divmod(piece.shape[1], 8)
            sums = self._new_sums(keys, whole + bool(tail))
            if whole:
                self._adder.add(piece[:, : whole * 8].view(torch.int64), 0, sums)
            if tail:
                last = torch.zeros(len(keys), 8, dtype=torch.uint8, device=self._device)
                last[:, :tail] = piece[:, whole * 8 :]
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
        for begin in range(0, nbytes, self._piece):
            self._check()
            end = min(begin + self._piece, nbytes)
            sums = self._new_sums(keys, -(-(end - begin) // 8))
            for start in range(begin, end, most):
                x = self._copied(tensors, start, min(most, end - start))
                self._adder.add(x, (start - begin) // 8, sums)

    def _sum_gapped(self, key: _Key, tensor: torch.Tensor) -> None:
        """Sum a tensor with gaps or overlaps through the scratch, in whole rows but for the ends of pieces."""
        scratch, at, whole = self._get_scratch(), 0, self._piece // 8
        as_uint8 = scratch.view(torch.uint8)
        most = min(self._tuning.scratch * 4 // tensor.element_size(), self._tuning.block)
        slabs = self._checked(self._reads.slabs(tensor, most))
        for start, nbytes in copy_elements(as_uint8, slabs, WIDTH * 8, self._piece):
            first, words = start // 8, -(-nbytes // 8)
            as_uint8[start + nbytes : (first + words) * 8] = 0
            if at == 0:
                sums = self._new_sums([key], whole)
            self._adder.add(scratch[first : first + words].view(1, words), at, sums)
            at = (at + words) % whole

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
        """Zeroed sums for one more piece, of `words` words, of each key's tensor: [key, sum]."""
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
        """Fold each piece's sums into its digest, and empty the pool."""
        if self._pool_keys:
            count, width = len(self._pool_keys), self._pool_width
            used = self._pool[: count * width].view(count, width)
            self._folded.append(fold(used, self._weights[: 2 * width], self._tuning.block))
            self._folded_keys += self._pool_keys
            self._pool_keys = []
            used.zero_()


def _count_sums(words: int) -> int:
    """How many sums a piece of so many words has."""
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


def fold(sums: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
    """For each row of sums [k, sum], the sum of their 32-bit halves, each times its weight: [k]. No operation takes
    more than `most` elements.
    """
    step = max(1, most // weights.numel())
    return torch.cat([(part.view(torch.int32) * weights).sum(1) for part in sums.split(step)])


def _half_weights(count: int) -> torch.Tensor:
    """The odd weights of the halves of the first `count` sums: of each, the low half's, then the high half's."""
    state = torch.arange(1, 2 * count + 1, dtype=torch.int64, device="cpu") * _signed(GOLDEN)
    return _mix_(state) | 1


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """`definition.mix`, in place."""
    high = words >> 32
    words ^= high.bitwise_and_(0xFFFFFFFF)
    words *= _signed(ODD)
    torch.bitwise_right_shift(words, 29, out=high)
    words ^= high.bitwise_and_((1 << 35) - 1)
    return words


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
