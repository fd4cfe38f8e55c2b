"""A tensor's bytes in the order in which they lie in memory: as views where possible, otherwise copied in parts."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch

from tensorfork import layout


def as_bytes(tensor: torch.Tensor, start: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The bytes from byte `start` of a tensor on, as a uint8 view of this shape and stride."""
    at = tensor.storage_offset() * tensor.element_size() + start
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), at, shape, stride)


def copy_elements(
    scratch: torch.Tensor, parts: Iterable[torch.Tensor], row: int, piece: int
) -> Iterator[tuple[int, int]]:
    """Copy these parts of a tensor, of at most half the scratch each, through the scratch, in order.

    Yields stretches of it, as (start, nbytes) in bytes, that the caller must use before it goes on: whole rows of `row`
    bytes, of which the first begins with the piece, but for the last stretch of a piece of `piece` bytes.
    """
    used = itemsize = at = 0
    for part in parts:
        n, itemsize = part.numel(), part.element_size()
        view = scratch.view(part.dtype)
        if used + n > view.numel():
            done, filled = 0, used * itemsize
            while (nbytes := min(filled - done, piece - at)) >= row or nbytes == piece - at:
                if nbytes < piece - at:
                    nbytes -= nbytes % row
                yield done, nbytes
                done, at = done + nbytes, (at + nbytes) % piece
            scratch[: filled - done] = scratch[done:filled]
            used = (filled - done) // itemsize
        view[used : used + n].view(part.shape).copy_(part)
        used += n
    done, filled = 0, used * itemsize
    while done < filled:
        nbytes = min(filled - done, piece - at)
        yield done, nbytes
        done, at = done + nbytes, 0


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, which are copied bit for bit and which every operation supports."""
    if tensor.element_size() == 16:
        tensor = torch.view_as_real(tensor)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def by_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its dimensions by falling stride: contiguous if it is dense."""
    stride, shape = tensor.stride(), tensor.shape
    return tensor.permute(sorted(range(tensor.dim()), key=lambda i: (-stride[i], -shape[i])))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a range of memory without gaps or overlaps, in any order of dimensions."""
    return tensor.is_contiguous() or layout.is_dense(tensor.shape, tensor.stride())


def read_once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what expanding and sliding windows repeat, so that each element is read once.

    Dimensions of stride 0 count as of one element. By falling stride, a dimension whose stride is a multiple of the
    next one's, and so short that its steps overlap, makes one dimension with it. A tensor without such is returned.
    """
    if is_dense(tensor):
        return tensor
    dimensions = _read_once(tensor.shape, tensor.stride())
    if prod(size for _, size in dimensions) == tensor.numel():
        return tensor
    return tensor.as_strided([size for _, size in dimensions], [step for step, _ in dimensions])


def bytes_read_once(tensor: layout.TensorLayout) -> int:
    """How many bytes a tensor of this layout has, as `read_once` reads it."""
    if tensor.is_dense:
        return tensor.nbytes
    itemsize = tensor.nbytes // max(1, tensor.numel)
    return prod(size for _, size in _read_once(tensor.shape, tensor.stride)) * itemsize


def _read_once(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """The dimensions that `read_once` makes, as (stride, size), by falling stride."""
    dimensions: list[tuple[int, int]] = []
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1 or step == 0:
            continue
        if dimensions and step % dimensions[-1][0] == 0 and step < dimensions[-1][0] * dimensions[-1][1]:
            inner, count = dimensions[-1]
            dimensions[-1] = inner, count + step // inner * (size - 1)
        else:
            dimensions.append((step, size))
    return dimensions[::-1]


def slabs(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Split along the leading dimensions into parts of at most `most` elements, in order."""
    if tensor.numel() <= most:
        yield tensor
        return
    inner = tensor.numel() // len(tensor)
    count = max(1, most // inner)
    for start in range(0, len(tensor), count):
        part = tensor.narrow(0, start, min(count, len(tensor) - start))
        if inner > most:
            yield from slabs(part[0], most)
        else:
            yield part
