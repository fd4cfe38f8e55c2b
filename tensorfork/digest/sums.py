"""The sums that a digest is made of: of a segment's columns, of its columns at another width, of its rows.

A segment's sums stand side by side as slots, in that order; `digest` says what they are for and why these widths.
"""

from collections.abc import Sequence
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
        self._apart: _BlockPartials | None = None

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
        row = COLUMNS + at // WIDTH
        if n > self._block:
            self._add_blocks(x[0], head, slots[0], row)
        else:
            rows, others = _cut(x, 0, full, WIDTH), _cut(x, head, full_other, OTHER_WIDTH)
            torch.sum(rows, 2, out=_cut(slots, row, full))
            _cut(slots, 0, WIDTH).add_(rows.sum(1))
            _cut(slots, WIDTH, OTHER_WIDTH).add_(others.sum(1))
        if head:
            _cut(slots, WIDTH + at % OTHER_WIDTH, head).add_(_cut(x, 0, head))
        if rest := n - full * WIDTH:
            last = _cut(x, n - rest, rest)
            _cut(slots, 0, rest).add_(last)
            _cut(slots, row + full, 1).add_(last.sum(1, keepdim=True))
        if rest := n - head - full_other * OTHER_WIDTH:
            _cut(slots, WIDTH, rest).add_(_cut(x, n - rest, rest))

    def _add_blocks(self, words: torch.Tensor, head: int, slots: torch.Tensor, row: int) -> None:
        """Add the whole rows of either width of one segment, block by block: all three sums of one while it is in the
        cache, and the columns of several kept apart, to be added together.
        """
        if self._apart is None:
            self._apart = _BlockPartials(self._block // WIDTH)
        step = self._apart.blocks
        full, full_other = words.shape[0] // WIDTH, (words.shape[0] - head) // OTHER_WIDTH
        blocks = words[: full * WIDTH].view(full, WIDTH).split(step)
        others = words[head : head + full_other * OTHER_WIDTH].view(full_other, OTHER_WIDTH).split(step)
        into = slots[row : row + full].split(step)
        for start in range(0, len(blocks), step):
            end = start + step
            self._apart.add(blocks[start:end], others[start:end], into[start:end], slots)


class _BlockPartials:
    """Columns of several blocks, kept apart to be added together. Made once: a view costs as much as a block's sum."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        """So many, each of as many rows."""
        self._sums = [torch.empty(blocks, width, dtype=torch.int64, device="cpu") for width in (WIDTH, OTHER_WIDTH)]
        self._outs = [sums.unbind() for sums in self._sums]

    def add(
        self,
        blocks: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor],
        into: Sequence[torch.Tensor],
        slots: torch.Tensor,
    ) -> None:
        """Add blocks [i, WIDTH] and others [i, OTHER_WIDTH] to the slots of one segment; set those of the rows."""
        for block, other, rows, columns, other_columns in zip_longest(blocks, others, into, *self._outs):
            if block is not None:
                torch.sum(block, 1, out=rows)
                torch.sum(block, 0, out=columns)
            if other is not None:
                torch.sum(other, 0, out=other_columns)
            elif block is None:
                break
        slots[:WIDTH].add_(self._sums[0][: len(blocks)].sum(0))
        slots[WIDTH:COLUMNS].add_(self._sums[1][: len(others)].sum(0))


def _cut(matrix: torch.Tensor, start: int, *shape: int) -> torch.Tensor:
    """Of each row [k, n] the words from `start` on, in a shape: [k, *shape]. One view, where indexing makes several."""
    inner = (shape[1], 1) if len(shape) == 2 else (1,)
    return matrix.as_strided((matrix.shape[0], *shape), (matrix.stride(0), *inner), matrix.storage_offset() + start)
