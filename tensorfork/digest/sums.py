"""The sums that a digest is made of: of a piece's columns, of its columns at another width, of its rows.

A piece's sums stand side by side in a row of a tensor, in that order. `definition` says what they are for, and why
they have these widths.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch

WIDTH, OTHER_WIDTH = 1021, 1031
COLUMNS = WIDTH + OTHER_WIDTH


class PieceSums:
    """Adds words to the sums of their pieces.

    Args:
        block: words that are summed at a time.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._partials: _BlockPartials | None = None

    def add(self, x: torch.Tensor, at: int, sums: torch.Tensor) -> None:
        """Add the words x [k, n], which begin at word `at` of their pieces, to sums [k, sum].

        `at` is a multiple of WIDTH, or x is one word. Sums of whole rows are set, not added to.
        """
        n = x.shape[1]
        if n == 1:
            for index in (at % WIDTH, WIDTH + at % OTHER_WIDTH, COLUMNS + at // WIDTH):
                _columns(sums, index, 1).add_(x)
            return
        head = min(n, -at % OTHER_WIDTH)  # up to the next row of the other width
        full, full_other = n // WIDTH, (n - head) // OTHER_WIDTH
        row = COLUMNS + at // WIDTH
        if n > self._block:
            self._add_blocks(x[0], head, sums[0], row)
        else:
            rows, others = _columns(x, 0, full, WIDTH), _columns(x, head, full_other, OTHER_WIDTH)
            torch.sum(rows, 2, out=_columns(sums, row, full))
            _columns(sums, 0, WIDTH).add_(rows.sum(1))
            _columns(sums, WIDTH, OTHER_WIDTH).add_(others.sum(1))
        if head:
            _columns(sums, WIDTH + at % OTHER_WIDTH, head).add_(_columns(x, 0, head))
        if rest := n - full * WIDTH:
            last = _columns(x, n - rest, rest)
            _columns(sums, 0, rest).add_(last)
            _columns(sums, row + full, 1).add_(last.sum(1, keepdim=True))
        if rest := n - head - full_other * OTHER_WIDTH:
            _columns(sums, WIDTH, rest).add_(_columns(x, n - rest, rest))

    def _add_blocks(self, words: torch.Tensor, head: int, sums: torch.Tensor, row: int) -> None:
        """Add the whole rows of either width of one piece, a block at a time.

        All three families of sums of a block are computed while it is in the cache. Several blocks' sums of columns are
        kept separately, and then added together.
        """
        if self._partials is None:
            self._partials = _BlockPartials(self._block // WIDTH)
        step = self._partials.blocks
        full, full_other = words.shape[0] // WIDTH, (words.shape[0] - head) // OTHER_WIDTH
        blocks = words[: full * WIDTH].view(full, WIDTH).split(step)
        others = words[head : head + full_other * OTHER_WIDTH].view(full_other, OTHER_WIDTH).split(step)
        row_sums = sums[row : row + full].split(step)
        for start in range(0, len(blocks), step):
            end = start + step
            self._partials.add(blocks[start:end], others[start:end], row_sums[start:end], sums)


class _BlockPartials:
    """Sums of columns of several blocks, kept separately. Made once: making a view costs as much as summing a block."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        """How many blocks, and how many rows in each."""
        self._sums = [torch.empty(blocks, width, dtype=torch.int64, device="cpu") for width in (WIDTH, OTHER_WIDTH)]
        self._outs = [sums.unbind() for sums in self._sums]

    def add(
        self,
        blocks: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor],
        row_sums: Sequence[torch.Tensor],
        sums: torch.Tensor,
    ) -> None:
        """Add blocks [row, WIDTH] and others [row, OTHER_WIDTH] to one piece's sums; set those of the rows."""
        for block, other, rows, columns, other_columns in zip_longest(blocks, others, row_sums, *self._outs):
            if block is not None:
                torch.sum(block, 1, out=rows)
                torch.sum(block, 0, out=columns)
            if other is not None:
                torch.sum(other, 0, out=other_columns)
            elif block is None:
                break
        sums[:WIDTH].add_(self._sums[0][: len(blocks)].sum(0))
        sums[WIDTH:COLUMNS].add_(self._sums[1][: len(others)].sum(0))


def _columns(matrix: torch.Tensor, start: int, *shape: int) -> torch.Tensor:
    """The words from `start` on of each row of a matrix [k, n], as [k, *shape]. One view; indexing makes several."""
    inner = (shape[1], 1) if len(shape) == 2 else (1,)
    return matrix.as_strided((matrix.shape[0], *shape), (matrix.stride(0), *inner), matrix.storage_offset() + start)
