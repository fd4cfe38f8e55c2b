"""What a model is made of: its tensors, and the storages they lie in.

`survey` walks a model and describes what it finds without copying a byte. The description (`ModelLayout`) is what a
seed tells its forks; the addresses stay behind, in the `Memory` beside it.

A storage, here, is a stretch of one allocation from the first byte that any published tensor uses to the last: a model
that holds ten rows of a large buffer publishes ten rows. Its start is rounded down to 512 bytes, so that a tensor is as
well aligned in a fork's copy of the storage as in the seed's.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from tensorfork.errors import UnsupportedTensor
from tensorfork.identity import Identity, Rank
from tensorfork.placement import Placement, sizes
from tensorfork.selection import Selection
from tensorfork.transports.base import Region
from tensorfork.walk import Found, walk

ALIGNMENT = 512
"""Bytes: what CUDA's allocator rounds to, and more than any dtype or kernel asks for."""


_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _natural(instance: Any, attribute: Any, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{attribute.name} must be a natural number, not {str(value)[:80]}")


def _text(instance: Any, attribute: Any, value: Any) -> None:
    if type(value) is not str or len(value) > 4096:
        raise ValueError(f"{attribute.name} must be a text of at most 4096 characters, not {str(value)[:80]}")


def _placed(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and type(value) is not Placement:
        raise ValueError(f"{attribute.name} must be a Placement, not {str(value)[:80]}")


@frozen
class TensorLayout:
    """One tensor. Equal to another when a fork could fill the one from the other: its place does not count.

    Attributes:
        name: where the model keeps it, such as ``encoder.0.weight``.
        dtype: torch's name for it, such as ``bfloat16``.
        shape: elements along each dimension.
        stride: elements from one to the next along each dimension; as a contiguous tensor's where it does not matter
            (dimensions of size one, empty tensors).
        storage: index of its storage in the model's layout.
        offset: bytes from the start of that storage to its first element.
        placement: of a `DTensor`'s local shard, which part of the whole it is.
    """

    name: str = field(validator=_text)
    dtype: str = field(validator=_text)
    shape: tuple[int, ...] = field(validator=sizes)
    stride: tuple[int, ...] = field(validator=sizes)
    storage: int = field(validator=_natural, eq=False)
    offset: int = field(validator=_natural, eq=False)
    placement: Placement | None = field(default=None, validator=_placed)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself. Raises `UnsupportedTensor` where this torch does not have it."""
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise UnsupportedTensor(
                f"{self.name}: torch {torch.__version__} has no dtype {self.dtype!r}; use the seed's version of torch"
            )
        return dtype

    @property
    def numel(self) -> int:
        """Elements."""
        return _product(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; gaps between them do not count."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from its first element's first byte to its last element's last, gaps included."""
        if self.numel == 0:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.torch_dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill its extent, each in a place of its own: contiguous, transposed or permuted."""
        return (
            _fills(zip(reversed(self.stride), reversed(self.shape), strict=True))  # the usual order
            or _fills(sorted(zip(self.stride, self.shape, strict=True)))
            or self.numel == 0
        )

    def difference(self, other: "TensorLayout") -> str | None:
        """In words, what makes it (the seed's) unlike the other (ours); None where a fork could fill it."""
        if (self.dtype, self.shape, self.stride, self.placement) == (
            other.dtype,
            other.shape,
            other.stride,
            other.placement,
        ):
            return None
        found = [
            f"{what} {theirs} in the seed, {ours} here"
            for what, theirs, ours in (
                ("dtype", self.dtype, other.dtype),
                ("shape", self.shape, other.shape),
                ("stride", self.stride, other.stride),
                ("placement", self.placement or "whole", other.placement or "whole"),
            )
            if theirs != ours
        ]
        return "; ".join(found) or None


@frozen
class StorageLayout:
    """One storage: its bytes, and the device it is on in the process that describes it."""

    nbytes: int = field(validator=_natural)
    device: str = field(validator=_text)


@frozen(repr=False)
class ModelLayout:
    """Every tensor and storage of one model. Tied tensors are several names at one place.

    Attributes:
        tensors: all of them.
        storages: what they lie in.
        left_out: names of tensors that the model has besides, and that whoever published it left out.
        identity: which model it is, where that was said.
        rank: which part of it, where that was said.
    """

    tensors: tuple[TensorLayout, ...]
    storages: tuple[StorageLayout, ...]
    left_out: tuple[str, ...] = ()
    identity: Identity | None = None
    rank: Rank | None = None

    def __attrs_post_init__(self) -> None:
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("a name stands twice in the layout")
        for tensor in self.tensors:
            if len(tensor.shape) != len(tensor.stride):
                raise ValueError(f"{tensor.name} has {len(tensor.shape)} sizes and {len(tensor.stride)} strides")
            if tensor.storage >= len(self.storages):
                raise ValueError(f"{tensor.name} lies in storage {tensor.storage} of {len(self.storages)}")
            if tensor.offset + tensor.extent > self.storages[tensor.storage].nbytes:
                raise ValueError(f"{tensor.name} reaches beyond its storage")
            if tensor.offset % tensor.torch_dtype.itemsize:
                raise ValueError(f"{tensor.name} does not begin at a multiple of its element's size")

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: what a whole copy occupies."""
        return sum(storage.nbytes for storage in self.storages)

    def only(self, takes: Callable[[str], bool]) -> tuple["ModelLayout", list[str]]:
        """The same with only the tensors whose names are taken, in the same storages; and the names of the others."""
        taken = tuple(tensor for tensor in self.tensors if takes(tensor.name))
        if len(taken) == len(self.tensors):
            return self, []
        return evolve(self, tensors=taken), [tensor.name for tensor in self.tensors if not takes(tensor.name)]

    def __repr__(self) -> str:
        devices = ", ".join(sorted({storage.device for storage in self.storages})) or "nowhere"
        return (
            f"<ModelLayout {len(self.tensors):,} tensors in {len(self.storages):,} storages, "
            f"{self.nbytes / 1e9:.3f} GB on {devices}>"
        )


@frozen(eq=False, repr=False)
class Memory:
    """Where the storages of a `ModelLayout` lie in this process (None for meta ones); keeps them alive."""

    addresses: Sequence[int | None]
    keep: Sequence[torch.UntypedStorage]

    def regions(self, layout: ModelLayout) -> list[Region]:
        """One region for each storage that has bytes and memory, with the storage's index as its id."""
        return [
            Region(index, address, storage.nbytes, storage.device, self)
            for index, (address, storage) in enumerate(zip(self.addresses, layout.storages, strict=True))
            if address is not None and storage.nbytes
        ]


@frozen(eq=False, repr=False)
class Survey:
    """A model as it is here.

    Attributes:
        layout: its description.
        tensors: the tensors by name, none of them made of others.
        wrappers: those that are made of these, by name, the inner ones first.
        memory: where they lie.
    """

    layout: ModelLayout
    tensors: Mapping[str, torch.Tensor]
    wrappers: Mapping[str, torch.Tensor]
    memory: Memory


def survey(
    model: Any, selection: Selection | None = None, identity: Identity | None = None, rank: Rank | None = None
) -> Survey:
    """Describe a model, or what is selected of it. Copies nothing.

    Raises:
        TypeError: it is not a model.
        UnsupportedTensor: it has a tensor that cannot be described; the message names it.
    """
    with _no_collections():
        return _survey(walk(model, selection), identity, rank)


def _survey(found: Found, identity: Identity | None, rank: Rank | None) -> Survey:
    homes = [_home(name, tensor) for name, tensor in found.tensors.items()]
    spans = _spans(homes)
    layouts = tuple(
        _describe(name, tensor, home, spans, found.placements.get(name))
        for (name, tensor), home in zip(found.tensors.items(), homes, strict=True)
    )
    storages = tuple(StorageLayout(span.end - span.start, span.device) for span in spans.values())
    memory = Memory([span.address for span in spans.values()], [kept for span in spans.values() for kept in span.keep])
    layout = ModelLayout(layouts, storages, found.left_out, identity, rank)
    return Survey(layout, found.tensors, found.wrappers, memory)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Put garbage collection off: what is made here all stays, and looking through it takes as long as making it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Home:
    """Where one tensor lies: an allocation (its base address, or a number for a meta storage), and bytes in it."""

    __slots__ = ("base", "device", "end", "key", "start", "storage")

    def __init__(self, key: Any, base: int | None, device: str, start: int, end: int, storage: Any) -> None:
        self.key, self.base, self.device = key, base, device
        self.start, self.end, self.storage = start, end, storage


class _Span:
    """A stretch of one allocation that tensors use; start and end in bytes from the allocation's base."""

    __slots__ = ("base", "device", "end", "index", "keep", "start")

    def __init__(self, index: int, home: _Home) -> None:
        self.index, self.base, self.device = index, home.base, home.device
        self.start, self.end, self.keep = home.start, home.end, [home.storage]

    @property
    def address(self) -> int | None:
        return None if self.base is None else self.base + self.start


def _home(name: str, tensor: torch.Tensor) -> _Home:
    if why := _why_not(tensor):
        raise UnsupportedTensor(f"{name}: {why}")
    storage = tensor.untyped_storage()
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    end = start
    if tensor.is_contiguous():
        end += tensor.numel() * itemsize
    elif tensor.numel():
        end += (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * itemsize
    device = str(tensor.device)
    if tensor.is_meta:
        return _Home((device, storage._cdata), None, device, start, end, storage)
    base = storage.data_ptr()
    if not tensor.numel():  # no memory to speak of; a home of its own keeps it out of everybody's span
        return _Home((device, "empty"), 0, device, 0, 0, storage)
    return _Home((device, base), base, device, start, end, storage)


def _why_not(tensor: torch.Tensor) -> str | None:
    if isinstance(tensor, UninitializedTensorMixin):
        return "it is not initialised yet; run the lazy module once first"
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"a {kind} tensor cannot be forked; publish its dense parts in a mapping"
    if tensor.is_quantized:
        return "a torch.quantized tensor cannot be forked; publish its int_repr() and scales in a mapping"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a lazy conjugate or negative; call .resolve_conj().resolve_neg() on it first"
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        return f"tensors on {tensor.device.type} cannot be forked; only cpu and cuda"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        if not _is_plain(tensor):
            return f"a {type(tensor).__name__} holds its bytes elsewhere; publish its inner tensors in a mapping"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a subclass holds its bytes as a plain tensor does, in a storage of its own."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not hasattr(
        tensor, "__tensor_flatten__"
    )


def _spans(homes: Sequence[_Home]) -> dict[Any, _Span]:
    """The span of each allocation, numbered in the order in which the model's tensors first use them.

    Two storages over the same memory (made through DLPack or a raw pointer) are one allocation.
    """
    alias: dict[Any, _Home] = {}
    reach: dict[str, tuple[int, _Home]] = {}
    whole: dict[Any, _Home] = {}
    for home in homes:
        known = whole.get(home.key)
        if home.base and (known is None or home.storage.nbytes() > known.storage.nbytes()):
            whole[home.key] = home
    for home in sorted(whole.values(), key=lambda home: (home.device, home.base)):
        assert home.base is not None
        end, owner = reach.get(home.device, (0, home))
        if home.base >= end:
            owner = home
        alias[home.key] = owner
        reach[home.device] = (max(end, home.base + home.storage.nbytes()), owner)
    spans: dict[Any, _Span] = {}
    for home in homes:
        owner = alias.get(home.key, home)
        if owner is not home and home.base is not None and owner.base is not None:
            shift = home.base - owner.base
            home.start, home.end, home.key, home.base = home.start + shift, home.end + shift, owner.key, owner.base
        span = spans.get(home.key)
        if span is None:
            spans[home.key] = _Span(len(spans), home)
        else:
            span.start, span.end = min(span.start, home.start), max(span.end, home.end)
            if span.keep[-1] is not home.storage:
                span.keep.append(home.storage)
    for span in spans.values():
        span.start -= span.start % ALIGNMENT
    return spans


def _describe(
    name: str, tensor: torch.Tensor, home: _Home, spans: Mapping[Any, _Span], placement: Placement | None
) -> TensorLayout:
    span = spans[home.key]
    shape = tuple(tensor.shape)
    if (home.start - span.start) % tensor.element_size():
        raise UnsupportedTensor(
            f"{name}: in memory that it shares with other tensors it does not begin at a multiple of its element's "
            "size, where no fork could have it; publish a copy"
        )
    return TensorLayout(
        name,
        _NAMES[tensor.dtype],
        shape,
        plain_stride(shape, tensor.stride()),
        span.index,
        home.start - span.start,
        placement,
    )


def _fills(steps: Iterable[tuple[int, int]]) -> bool:
    """Whether dimensions of these (strides, sizes), the innermost first, leave no gap and reach nothing twice."""
    expected = 1
    for step, size in steps:
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def plain_stride(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The stride, with the values that touch no memory (sizes of one, empty tensors) as a contiguous tensor's."""
    if 0 in shape:
        sizes = [max(size, 1) for size in reversed(shape[1:])]
        return tuple(reversed(list(accumulate(sizes, mul, initial=1)))) if shape else ()
    if 1 not in shape:
        return tuple(stride)
    plain = list(stride)
    for i in range(len(shape) - 1, -1, -1):
        if shape[i] == 1:
            plain[i] = plain[i + 1] * shape[i + 1] if i + 1 < len(shape) else 1
    return tuple(plain)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
