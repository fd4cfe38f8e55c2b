"""The runs, contiguous ranges of bytes, that a strided tensor's elements fill. Pure."""

from collections.abc import Iterable, Sequence

from tensorfork.layout import TensorLayout

MAX_RUNS = 1024
"""A tensor of more runs than this is fetched with its gaps, and copied into place on our side (`fork.strided`)."""

MAX_RUNS_OF_ALL = 1 << 17
"""Runs of all tensors that have gaps, at most: some 40 MB of Python's objects."""


def max_runs(gapped: int) -> int:
    """How many runs each of so many tensors with gaps may have, to be fetched run by run."""
    return min(MAX_RUNS, MAX_RUNS_OF_ALL // max(1, gapped))


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of these (start, end): sorted, and merged where they touch or overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def grid_of(tensor: TensorLayout) -> tuple[int, list[tuple[int, int]]]:
    """A tensor's bytes as a grid of equal runs: the bytes of one run, and (step in bytes, size) for each dimension.

    The longest step comes first. Elements that touch or overlap along a dimension are one run.
    """
    length = tensor.torch_dtype.itemsize
    steps: list[tuple[int, int]] = []
    for step, size in sorted(zip(tensor.stride, tensor.shape, strict=True)):
        step *= tensor.torch_dtype.itemsize
        if size == 1 or step == 0:
            continue
        if step <= length:
            length += (size - 1) * step
            continue
        for i, (inner, count) in enumerate(steps):
            if step % inner == 0 and step // inner <= count:  # both together reach every multiple of the inner step
                steps[i] = inner, count + step // inner * (size - 1)
                break
        else:
            steps.append((step, size))
    return length, steps[::-1]


def runs_of(tensor: TensorLayout, limit: int) -> list[tuple[int, int]]:
    """The runs of a tensor's elements, as (offset from its first byte, bytes), merged where they touch.

    If the grid has more than `limit` points, returns `limit` + 1 of these.
    """
    if tensor.is_dense:
        return [(0, tensor.numel * tensor.torch_dtype.itemsize)] if tensor.numel else []
    length, steps = grid_of(tensor)
    offsets = sorted(_offsets(steps, limit + 1))
    if len(offsets) > limit:
        return [(offset, length) for offset in offsets]
    merged: list[tuple[int, int]] = []
    for offset in offsets:
        if merged and merged[-1][0] + merged[-1][1] >= offset:
            start = merged[-1][0]
            merged[-1] = (start, max(merged[-1][1], offset + length - start))
        else:
            merged.append((offset, length))
    return merged


def _offsets(steps: Sequence[tuple[int, int]], most: int) -> list[int]:
    """The offset of every point of a grid, or of its first `most`."""
    offsets = [0]
    for step, size in reversed(steps):
        if len(offsets) == most:
            break
        rows = min(size, most // len(offsets) + 1)
        offsets = [i * step + inner for i in range(rows) for inner in offsets][:most]
    return offsets
