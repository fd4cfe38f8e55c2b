"""The sums that a digest is made of: of a segment's columns, of its columns at another width, of its rows.

A segment's sums stand side by side as slots, in that order; `digest` says what they are for and why these widths.
"""

from itertools import zip_longest

import torch

WIDTH, OTHER_WIDTH = 1021, 1031
COLUMNS = WIDTH + OTHER_WIDTH


class Sums:
    """Adds words to the slots of their segments.

    Args:
        block: words that are summed at a time.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._apart: _Apart | None = None

    def add(self, x: torch.Tensor, at: int, slots: torch.Tensor) -> None:
        """Add to the slots [k, slot] the words x [k, n], which stand at `at` in their segments; `at` is a multiple of
        WIDTH, or x is one word. The slots of whole rows are set.
        """
        n = x.shape[1]
        if n == 1:
            for slot in (at % WIDTH, WIDTH + at % OTHER_WIDTH, COLUMNS + at // WIDTH):
                _cut(slots, slot, 1).add_(x)
            return
        head = min(n, -at % OTHER_WIDTH)  # to where the columns of the other width begin anew
        full, full_other = n // WIDTH, (n - head) // OTHER_WIDTH
        summed, summed_other = 0, 0
        if x.numel() > self._block:
            summed, summed_other = self._add_blocks(x, head, slots, at)
        row = COLUMNS + at // WIDTH
        if summed < full:
            rows = _cut(x, summed * WIDTH, full - summed, WIDTH)
            torch.sum(rows, 2, out=_cut(slots, row + summed, full - summed))
            _cut(slots, 0, WIDTH).add_(rows.sum(1))
        if summed_other < full_other:
            others = _cut(x, head + summed_other * OTHER_WIDTH, full_other - summed_other, OTHER_WIDTH)
            _cut(slots, WIDTH, OTHER_WIDTH).add_(others.sum(1))
        if head:
            _cut(slots, WIDTH + at % OTHER_WIDTH, head).add_(_cut(x, 0, head))
        if rest := n - full * WIDTH:
            last = _cut(x, n - rest, rest)
            _cut(slots, 0, rest).add_(last)
            _cut(slots, row + full, 1).add_(last.sum(1, keepdim=True))
        if rest := n - head - full_other * OTHER_WIDTH:
            _cut(slots, WIDTH, rest).add_(_cut(x, n - rest, rest))

    def _add_blocks(self, x: torch.Tensor, head: int, slots: torch.Tensor, at: int) -> tuple[int, int]:
        """Add whole blocks of one segment, all three sums of one while it is in the cache; how many rows of either
        width that were.
        """
        if self._apart is None:
            self._apart = _Apart(self._block // WIDTH)
        step = self._apart.rows
        words = x[0]
        blocks = words.shape[0] // (step * WIDTH)
        other_blocks = (words.shape[0] - head) // (step * OTHER_WIDTH)
        rows = words[: blocks * step * WIDTH].view(-1, WIDTH)
        others = words[head:][: other_blocks * step * OTHER_WIDTH].view(-1, OTHER_WIDTH)
        row_slots = slots[0, COLUMNS + at // WIDTH :]
        for start in range(0, blocks * step, step * step):
            part = rows[start : start + step * step]
            self._apart.add(part, others[start : start + step * step], slots[0], row_slots[start : start + len(part)])
        return blocks * step, other_blocks * step


class _Apart:
    """Sums of several blocks, kept apart to be added together. Made once: a view costs as much as a block's sum."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        """Of one block; and so many blocks are kept apart."""
        self._sums = [torch.empty(rows, width, dtype=torch.int64, device="cpu") for width in (rows, WIDTH, OTHER_WIDTH)]
        self._outs = [sums.unbind() for sums in self._sums]

    def add(self, rows: torch.Tensor, others: torch.Tensor, slots: torch.Tensor, row_slots: torch.Tensor) -> None:
        """Add the sums of rows [i, WIDTH] and others [i, OTHER_WIDTH] to the slots of one segment."""
        blocks, other_blocks = rows.split(self.rows), others.split(self.rows) if len(others) else ()
        for block, other, row_sums, sums, other_sums in zip_longest(blocks, other_blocks, *self._outs):
            if block is None:
                break
            torch.sum(block, 1, out=row_sums)
            torch.sum(block, 0, out=sums)
            if other is not None:
                torch.sum(other, 0, out=other_sums)
        row_slots.copy_(self._sums[0][: len(blocks)].view(-1))
        slots[:WIDTH].add_(self._sums[1][: len(blocks)].sum(0))
        slots[WIDTH:COLUMNS].add_(self._sums[2][: len(other_blocks)].sum(0))


def _cut(matrix: torch.Tensor, start: int, *shape: int) -> torch.Tensor:
    """Of each row [k, n] the words from `start` on, in a shape: [k, *shape]. One view, where indexing makes several."""
    inner = (shape[1], 1) if len(shape) == 2 else (1,)
    return matrix.as_strided((matrix.shape[0], *shape), (matrix.stride(0), *inner), matrix.storage_offset() + start)
