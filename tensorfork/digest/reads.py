"""How a digest gets at the bytes of tensors: by torch, on the host in place, or on the host through the kernel."""

import ctypes
from collections.abc import Iterator, Sequence

import torch

from tensorfork.digest.elements import as_bytes, as_integers, by_stride, slabs
from tensorfork.memory import host_reads, huge_pages

_EXTENT = 1 << 20
"""Bytes that are read through the kernel at a time, of a tensor with gaps between its elements."""
_zeros = ctypes.create_string_buffer(8)


class TorchReads:
    """Reads by torch's operations, which all devices have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_scratch(self, words: int) -> torch.Tensor:
        """Memory to copy into: [word]."""
        return torch.empty(words, dtype=torch.int64, device=self._device)

    def gather(self, rows: torch.Tensor, tensors: Sequence[torch.Tensor], start: int, nbytes: int) -> None:
        """Copy `nbytes` bytes from byte `start` of each dense tensor to a row of the scratch [tensor, word]."""
        parts = [as_bytes(tensor, start, (nbytes,), (1,)) for tensor in tensors]
        torch.stack(parts, out=rows.view(torch.uint8)[:, :nbytes])

    def slabs(self, tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """A tensor's elements as integers, in the order in which they lie, in parts of at most `most` elements.

        Each part is to be used before the next is asked for.
        """
        return slabs(as_integers(by_stride(tensor)), most)


class HostReads(TorchReads):
    """Reads on the host, in place. What is gathered is copied without torch, and may have any alignment."""

    def gather(self, rows: torch.Tensor, tensors: Sequence[torch.Tensor], start: int, nbytes: int) -> None:
        """See `TorchReads.gather`."""
        target, step = rows.data_ptr(), rows.stride(0) * 8
        for i, tensor in enumerate(tensors):
            ctypes.memmove(target + i * step, tensor.data_ptr() + start, nbytes)


class CheckedReads(TorchReads):
    """Reads on the host through the kernel: raises `UnreadableMemory` where memory is not mapped any more.

    No operation of torch's, and no load of ours, touches a tensor's memory; nor a view of the tensor, which torch
    refuses to make once the storage has been shrunk.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copy: torch.Tensor | None = None

    def new_scratch(self, words: int) -> torch.Tensor:
        """See `TorchReads.new_scratch`."""
        return huge_pages.empty(words * 8).view(torch.int64)

    def gather(self, rows: torch.Tensor, tensors: Sequence[torch.Tensor], start: int, nbytes: int) -> None:
        """See `TorchReads.gather`. One system call writes all rows, with zeros to the end of each row's last word."""
        padding = rows.stride(0) * 8 - nbytes
        spans = []
        for tensor in tensors:
            spans.append((tensor.data_ptr() + start, nbytes))
            if padding:
                spans.append((ctypes.addressof(_zeros), padding))
        host_reads.read(spans, rows.data_ptr())

    def slabs(self, tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """See `TorchReads.slabs`. Each part is read with all that lies between its elements, into the same memory."""
        if self._copy is None:
            self._copy = huge_pages.empty(_EXTENT)
        address, copy = tensor.data_ptr(), self._copy
        geometry = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for slab in _slabs_within(as_integers(by_stride(geometry)), most, _EXTENT):
            start = address + int(slab.storage_offset()) * slab.element_size()
            host_reads.read([(start, _extent(slab))], copy.data_ptr())
            yield copy.view(slab.dtype).as_strided(slab.shape, slab.stride())


def _slabs_within(tensor: torch.Tensor, most: int, nbytes: int) -> Iterator[torch.Tensor]:
    """Slabs of at most `most` elements, that extend over at most `nbytes` bytes each, in order."""
    for slab in slabs(tensor, most):
        if _extent(slab) > nbytes:
            yield from _slabs_within(slab, slab.numel() // 2, nbytes)
        else:
            yield slab


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
