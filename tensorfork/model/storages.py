"""Where tensors lie: the allocations, and the stretches of them that tensors use."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from tensorfork.errors import UnsupportedTensor

ALIGNMENT = 512
"""Bytes: what CUDA's allocator rounds to, and more than any dtype or kernel asks for."""


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})


class TensorLocation:
    """Where one tensor lies: an allocation (its base address, or a number for a meta storage), and bytes in it."""

    __slots__ = ("base", "device", "end", "key", "extent", "start", "storage")
    extent: "StorageExtent"
    """The stretch that it is in, once `storage_extents` has told."""

    def __init__(self, key: Any, base: int | None, device: str, start: int, end: int, storage: Any) -> None:
        self.key, self.base, self.device = key, base, device
        self.start, self.end, self.storage = start, end, storage


class StorageExtent:
    """A stretch of one allocation that tensors use; start and end in bytes from the allocation's base."""

    __slots__ = ("base", "device", "end", "index", "keep", "start")

    index: int
    """Its number among all of a model's."""

    def __init__(self, location: TensorLocation) -> None:
        self.base, self.device = location.base, location.device
        self.start, self.end, self.keep = location.start, location.end, [location.storage]

    @property
    def address(self) -> int | None:
        """Of its first byte; None on the meta device."""
        return None if self.base is None else self.base + self.start


def _place(extent: StorageExtent) -> tuple[str, int]:
    return (extent.device, extent.address or 0) if extent.device.startswith("cuda") else ("", 0)


def locate(name: str, tensor: torch.Tensor) -> TensorLocation:
    """Where a tensor lies. Raises `UnsupportedTensor` for one that cannot be forked."""
    device = _device_name(tensor.device)
    if why := _why_not(tensor, device):
        raise UnsupportedTensor(f"{name}: {why}")
    storage = tensor.untyped_storage()
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    end = start
    if tensor.is_contiguous():
        end += tensor.numel() * itemsize
    elif tensor.numel():
        end += (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * itemsize
    if device == "meta":
        return TensorLocation((device, storage._cdata), None, device, start, end, storage)
    base = storage.data_ptr()
    if not tensor.numel():  # no memory to speak of; a location of its own keeps it out of everybody's extent
        return TensorLocation((device, "empty"), 0, device, 0, 0, storage)
    return TensorLocation((device, base), base, device, start, end, storage)


@cache
def _device_name(device: torch.device) -> str:
    return str(device)


def _why_not(tensor: torch.Tensor, device: str) -> str | None:
    plain = type(tensor) in _PLAIN
    if not plain and isinstance(tensor, UninitializedTensorMixin):
        return "it is not initialised yet; run the lazy module once first"
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"a {kind} tensor cannot be forked; publish its dense parts in a mapping"
    if tensor.is_quantized:
        return "a torch.quantized tensor cannot be forked; publish its int_repr() and scales in a mapping"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a lazy conjugate or negative; call .resolve_conj().resolve_neg() on it first"
    if not device.startswith(("cpu", "cuda", "meta")):
        return f"tensors on {tensor.device.type} cannot be forked; only cpu and cuda"
    if not plain and not _is_plain(tensor):
        return f"a {type(tensor).__name__} holds its bytes elsewhere; publish its inner tensors in a mapping"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a subclass holds its bytes as a plain tensor does, in a storage of its own."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not hasattr(
        tensor, "__tensor_flatten__"
    )


def storage_extents(locations: Sequence[TensorLocation]) -> dict[Any, StorageExtent]:
    """The extent of each allocation, numbered in the order in which the model's tensors first use them; those of GPUs
    behind the others, by address: many lie in one allocation of the driver's, and what a fork makes room for in this
    order has the same neighbours.

    Two storages over the same memory (made through DLPack or a raw pointer) are one allocation.
    """
    alias: dict[Any, TensorLocation] = {}
    reach: dict[str, tuple[int, TensorLocation]] = {}
    whole: dict[Any, TensorLocation] = {}
    for location in locations:
        if location.base:
            known = whole.setdefault(location.key, location)
            if known is not location and location.storage.nbytes() > known.storage.nbytes():
                whole[location.key] = location
    for key in sorted(whole):  # by device and base
        location = whole[key]
        assert location.base is not None
        end, owner = reach.get(location.device, (0, location))
        if location.base >= end:
            owner = location
        alias[location.key] = owner
        reach[location.device] = max(end, location.base + location.storage.nbytes()), owner
    extents: dict[Any, StorageExtent] = {}
    for location in locations:
        owner = alias.get(location.key, location)
        if owner is not location and location.base is not None and owner.base is not None:
            shift = location.base - owner.base
            location.start, location.end, location.key, location.base = (
                location.start + shift,
                location.end + shift,
                owner.key,
                owner.base,
            )
        extent = extents.get(location.key)
        if extent is None:
            extent = extents[location.key] = StorageExtent(location)
        else:
            extent.start, extent.end = min(extent.start, location.start), max(extent.end, location.end)
            if extent.keep[-1] is not location.storage:
                extent.keep.append(location.storage)
        location.extent = extent
    for extent in extents.values():
        extent.start -= extent.start % ALIGNMENT
    in_order = dict(sorted(extents.items(), key=lambda one: _place(one[1])))
    for index, extent in enumerate(in_order.values()):
        extent.index = index
    return in_order
