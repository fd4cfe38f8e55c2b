"""Where tensors lie: the allocations, and the parts of them that tensors use."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.kinds import PLAIN_TENSORS
from tensorfork.model.modes import STANDS_FOR_ANOTHER

ALIGNMENT = 512
"""Bytes: what CUDA's allocator rounds to, and more than any dtype or kernel asks for."""


class TensorLocation:
    """Where one tensor lies: the bytes from `start` to `end` of an allocation.

    `key` tells allocations apart; `base` is the allocation's address, None on the meta device; `storage` owns it.
    `contiguous` says that the tensor's elements fill all of these bytes, in order.
    """

    __slots__ = ("base", "contiguous", "device", "end", "extent", "key", "start", "storage")
    extent: "StorageExtent"
    """The extent that it lies in. Set by `storage_extents`."""

    def __init__(
        self, key: Any, base: int | None, device: str, start: int, end: int, storage: Any, contiguous: bool
    ) -> None:
        self.key, self.base, self.device, self.contiguous = key, base, device, contiguous
        self.start, self.end, self.storage = start, end, storage


class StorageExtent:
    """The part of one allocation that tensors use; start and end in bytes from the allocation's base."""

    __slots__ = ("base", "device", "end", "index", "start", "storages")

    index: int
    """Its number among all of a model's. Set by `storage_extents`."""

    def __init__(self, location: TensorLocation) -> None:
        self.base, self.device = location.base, location.device
        self.start, self.end, self.storages = location.start, location.end, [location.storage]

    def include(self, location: TensorLocation) -> None:
        """Grow to cover one more tensor of the same allocation."""
        self.start, self.end = min(self.start, location.start), max(self.end, location.end)
        if self.storages[-1] is not location.storage:
            self.storages.append(location.storage)

    @property
    def address(self) -> int | None:
        """Of its first byte; None on the meta device."""
        return None if self.base is None else self.base + self.start


def locate(name: str, tensor: torch.Tensor) -> TensorLocation:
    """Where a tensor lies. Raises `UnsupportedTensor` for one that cannot be forked."""
    device = _device_name(tensor.device)
    if why_not := _why_not_forkable(tensor, device):
        raise UnsupportedTensor(f"{name}: {why_not}")
    storage = tensor.untyped_storage()
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    end = start
    contiguous = tensor.is_contiguous()
    if contiguous:
        end += tensor.numel() * itemsize
    elif tensor.numel():
        end += (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * itemsize
    if device == "meta":
        return TensorLocation((device, storage._cdata), None, device, start, end, storage, contiguous)
    base = storage.data_ptr()
    if not tensor.numel():  # it has no bytes; a key of its own keeps it out of the extents of others
        return TensorLocation((device, "empty"), 0, device, 0, 0, storage, contiguous)
    if end > storage.nbytes():
        raise UnsupportedTensor(
            f"{name}: its storage has {storage.nbytes():,} bytes, and its elements need {end:,}: it was freed or "
            "shrunk (resize_). Give it its memory back first, or exclude it"
        )
    return TensorLocation((device, base), base, device, start, end, storage, contiguous)


@cache
def _device_name(device: torch.device) -> str:
    return str(device)


def _why_not_forkable(tensor: torch.Tensor, device: str) -> str | None:
    is_plain = type(tensor) in PLAIN_TENSORS
    if not is_plain and type(tensor).__module__.startswith("torch._subclasses."):
        return f"a {type(tensor).__name__} {STANDS_FOR_ANOTHER}"
    if not is_plain and isinstance(tensor, UninitializedTensorMixin):
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
    if not is_plain and not _has_own_storage(tensor):
        return f"a {type(tensor).__name__} holds its bytes elsewhere; publish its inner tensors in a mapping"
    return None


def _has_own_storage(tensor: torch.Tensor) -> bool:
    """Whether a subclass holds its bytes as a plain tensor does, in a storage of its own."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not hasattr(
        tensor, "__tensor_flatten__"
    )


def storage_extents(locations: Sequence[TensorLocation]) -> dict[Any, StorageExtent]:
    """The extent of each allocation, by its key; tells each location its extent.

    Extents are numbered in the order in which the model's tensors first use them, with those of GPUs last, by address:
    many of these lie in one allocation of the driver's, and a fork that allocates them in this order gives them the
    same neighbours. Two storages over the same memory (made through DLPack or a raw pointer) are one allocation.
    """
    enclosing = _enclosing_allocations(locations)
    extents: dict[Any, StorageExtent] = {}
    for location in locations:
        _express_within(location, enclosing.get(location.key, location))
        extent = extents.get(location.key)
        if extent is None:
            extent = extents[location.key] = StorageExtent(location)
        else:
            extent.include(location)
        location.extent = extent
    for extent in extents.values():
        extent.start -= extent.start % ALIGNMENT
    in_order = dict(sorted(extents.items(), key=lambda item: _order(item[1])))
    for index, extent in enumerate(in_order.values()):
        extent.index = index
    return in_order


def _enclosing_allocations(locations: Sequence[TensorLocation]) -> Mapping[Any, TensorLocation]:
    """For each allocation with memory, by its key, a location in the first allocation of those that overlap."""
    largest: dict[Any, TensorLocation] = {}
    for location in locations:
        if location.base:
            known = largest.setdefault(location.key, location)
            if known is not location and location.storage.nbytes() > known.storage.nbytes():
                largest[location.key] = location
    enclosing: dict[Any, TensorLocation] = {}
    reached: dict[str, tuple[int, TensorLocation]] = {}
    """By device, the address where the overlapping allocations end so far, and a location in the first of them."""
    for key in sorted(largest):  # by device and base
        location = largest[key]
        assert location.base is not None
        end, first = reached.get(location.device, (0, location))
        if location.base >= end:
            first = location
        enclosing[key] = first
        reached[location.device] = max(end, location.base + location.storage.nbytes()), first
    return enclosing


def _express_within(location: TensorLocation, other: TensorLocation) -> None:
    """Express a location in bytes of the allocation that the other one lies in."""
    if other is not location and location.base is not None and other.base is not None:
        shift = location.base - other.base
        location.start, location.end = location.start + shift, location.end + shift
        location.key, location.base = other.key, other.base


def _order(extent: StorageExtent) -> tuple[str, int]:
    return (extent.device, extent.address or 0) if extent.device.startswith("cuda") else ("", 0)
