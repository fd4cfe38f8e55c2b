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


class Home:
    """Where one tensor lies: an allocation (its base address, or a number for a meta storage), and bytes in it."""

    __slots__ = ("base", "device", "end", "key", "span", "start", "storage")
    span: "Span"
    """The stretch that it is in, once `spans_of` has told."""

    def __init__(self, key: Any, base: int | None, device: str, start: int, end: int, storage: Any) -> None:
        self.key, self.base, self.device = key, base, device
        self.start, self.end, self.storage = start, end, storage


class Span:
    """A stretch of one allocation that tensors use; start and end in bytes from the allocation's base."""

    __slots__ = ("base", "device", "end", "index", "keep", "start")

    index: int
    """Its number among all of a model's."""

    def __init__(self, home: Home) -> None:
        self.base, self.device = home.base, home.device
        self.start, self.end, self.keep = home.start, home.end, [home.storage]

    @property
    def address(self) -> int | None:
        """Of its first byte; None on the meta device."""
        return None if self.base is None else self.base + self.start


def _place(span: Span) -> tuple[str, int]:
    return (span.device, span.address or 0) if span.device.startswith("cuda") else ("", 0)


def home_of(name: str, tensor: torch.Tensor) -> Home:
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
        return Home((device, storage._cdata), None, device, start, end, storage)
    base = storage.data_ptr()
    if not tensor.numel():  # no memory to speak of; a home of its own keeps it out of everybody's span
        return Home((device, "empty"), 0, device, 0, 0, storage)
    return Home((device, base), base, device, start, end, storage)


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


def spans_of(homes: Sequence[Home]) -> dict[Any, Span]:
    """The span of each allocation, numbered in the order in which the model's tensors first use them; those of GPUs
    behind the others, by address: many lie in one allocation of the driver's, and what a fork makes room for in this
    order has the same neighbours.

    Two storages over the same memory (made through DLPack or a raw pointer) are one allocation.
    """
    alias: dict[Any, Home] = {}
    reach: dict[str, tuple[int, Home]] = {}
    whole: dict[Any, Home] = {}
    for home in homes:
        if home.base:
            known = whole.setdefault(home.key, home)
            if known is not home and home.storage.nbytes() > known.storage.nbytes():
                whole[home.key] = home
    for key in sorted(whole):  # by device and base
        home = whole[key]
        assert home.base is not None
        end, owner = reach.get(home.device, (0, home))
        if home.base >= end:
            owner = home
        alias[home.key] = owner
        reach[home.device] = max(end, home.base + home.storage.nbytes()), owner
    spans: dict[Any, Span] = {}
    for home in homes:
        owner = alias.get(home.key, home)
        if owner is not home and home.base is not None and owner.base is not None:
            shift = home.base - owner.base
            home.start, home.end, home.key, home.base = home.start + shift, home.end + shift, owner.key, owner.base
        span = spans.get(home.key)
        if span is None:
            span = spans[home.key] = Span(home)
        else:
            span.start, span.end = min(span.start, home.start), max(span.end, home.end)
            if span.keep[-1] is not home.storage:
                span.keep.append(home.storage)
        home.span = span
    for span in spans.values():
        span.start -= span.start % ALIGNMENT
    in_order = dict(sorted(spans.items(), key=lambda one: _place(one[1])))
    for index, span in enumerate(in_order.values()):
        span.index = index
    return in_order
