"""The runs of bytes that a strided tensor's elements fill. Pure."""

from collections.abc import Iterable, Iterator, Sequence

from tensorfork.layout import TensorLayout

MAX_RUNS = 1024
"""A tensor in more stretches than this is fetched with its gaps, and copied into place on our side."""


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What these (start, end) hold together: in order, what touches or overlaps as one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def grid_of(tensor: TensorLayout) -> tuple[int, list[tuple[int, int]]]:
    """A tensor's bytes as a grid of equal stretches: the bytes of one, and the (step in bytes, size) of each dimension
    along which it is repeated, longest step first. What touches or overlaps is one stretch.
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
    """The stretches of memory that a tensor's elements fill, as (offset from its first byte, bytes), merged where they
    touch. Where there are more than `limit` before they are merged, `limit` + 1 of them as they are.
    """
    if tensor.is_dense:
        return [(0, tensor.nbytes)] if tensor.numel else []
    length, steps = grid_of(tensor)
    offsets: set[int] = set()
    for offset in _offsets(steps):
        offsets.add(offset)
        if len(offsets) > limit:
            return [(offset, length) for offset in sorted(offsets)]
    found: list[tuple[int, int]] = []
    for offset in sorted(offsets):
        if found and found[-1][0] + found[-1][1] >= offset:
            start = found[-1][0]
            found[-1] = (start, max(found[-1][1], offset + length - start))
        else:
            found.append((offset, length))
    return found


def _offsets(steps: Sequence[tuple[int, int]]) -> Iterator[int]:
    if not steps:
        yield 0
        return
    step, size = steps[0]
    for i in range(size):
        for inner in _offsets(steps[1:]):
            yield i * step + inner
