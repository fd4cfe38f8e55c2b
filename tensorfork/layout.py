"""The layout of a model: its tensors, and the storages they lie in. A seed sends it to its forks; it has no addresses.

Here, a storage is the part of one allocation from the first byte that any published tensor uses to the last: a model
that holds ten rows of a large buffer publishes ten rows. Its start is rounded down to 512 bytes, so that a tensor is as
well aligned in a fork's copy of the storage as in the seed's. `tensorfork.model.describe` makes layouts of models.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from attrs import evolve, field, fields_dict, frozen

from tensorfork.columns import objects_of
from tensorfork.errors import UnsupportedTensor
from tensorfork.identity import Identity, Rank
from tensorfork.patience import Check, looking, unchecked
from tensorfork.placement import Placement
from tensorfork.validators import is_natural, is_naturals, is_text, natural_field, naturals_field, text_field

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _optional_placement(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and type(value) is not Placement:
        raise ValueError(f"{attribute.name} must be a Placement, not {str(value)[:80]}")


@frozen
class TensorLayout:
    """One tensor. Equal to another if a fork can fill one from the other: `storage` and `offset` are not compared.

    Attributes:
        name: where the model keeps it, such as ``encoder.0.weight``.
        dtype: torch's name for it, such as ``bfloat16``.
        shape: elements along each dimension.
        stride: elements from one to the next along each dimension; that of a contiguous tensor where it does not
            matter (dimensions of size one, empty tensors).
        storage: index of its storage in the model's layout.
        offset: bytes from the start of that storage to its first element.
        placement: for a `DTensor`'s local shard, which part of the whole it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int = field(eq=False)
    offset: int = field(eq=False)
    placement: Placement | None = None
    numel: int = field(init=False, eq=False, repr=False)
    """How many elements it has."""
    is_dense: bool = field(init=False, eq=False, repr=False)
    """Whether its elements fill its extent without gaps or overlaps: contiguous, transposed or permuted."""
    span: int = field(init=False, eq=False, repr=False)
    """Elements from its first to its last, with the gaps between them."""

    def __attrs_post_init__(self) -> None:
        # one function instead of a validator for each field: a fork makes three of these for each of its tensors
        shape, stride = self.shape, self.stride
        if not (
            is_text(self.name)
            and is_text(self.dtype)
            and is_naturals(shape)
            and is_naturals(stride)
            and len(shape) == len(stride)
            and is_natural(self.storage)
            and is_natural(self.offset)
            and (self.placement is None or type(self.placement) is Placement)
        ):
            self._raise_invalid()
        numel, dense, span = _form(shape, stride)
        object.__setattr__(self, "numel", numel)
        object.__setattr__(self, "is_dense", dense)
        object.__setattr__(self, "span", span)

    def _raise_invalid(self) -> None:
        attributes = fields_dict(TensorLayout)
        checks = {
            text_field: ("name", "dtype"),
            naturals_field: ("shape", "stride"),
            natural_field: ("storage", "offset"),
            _optional_placement: ("placement",),
        }
        for check, names in checks.items():
            for name in names:
                check(self, attributes[name], getattr(self, name))
        raise ValueError(f"{self.name} has {len(self.shape)} sizes and {len(self.stride)} strides")

    @classmethod
    def of_columns(
        cls,
        name: Sequence[str],
        dtype: Sequence[str],
        shape: Sequence[tuple[int, ...]],
        stride: Sequence[tuple[int, ...]],
        storage: Sequence[int],
        offset: Sequence[int],
        placement: Sequence[Placement | None],
    ) -> "list[TensorLayout]":
        """Many tensors, of columns in which each value was checked by itself. Raises `ValueError`."""
        forms = list(zip(shape, stride, strict=True))
        known: dict[Any, tuple[int, bool, int]] = {}
        for form in set(forms):
            if len(form[0]) != len(form[1]):
                raise ValueError(f"a tensor has {len(form[0])} sizes and {len(form[1])} strides")
            known[form] = _form(*form)
        numel, dense, span = zip(*map(known.__getitem__, forms), strict=True) if forms else ((), (), ())
        return objects_of(
            cls,
            name=name,
            dtype=dtype,
            shape=shape,
            stride=stride,
            storage=storage,
            offset=offset,
            placement=placement,
            numel=numel,
            is_dense=dense,
            span=span,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself. Raises `UnsupportedTensor` if this version of torch does not have it."""
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise UnsupportedTensor(
                f"{self.name}: torch {torch.__version__} has no dtype {self.dtype!r}; use the seed's version of torch"
            )
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without the gaps between them."""
        return self.numel * self.torch_dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from the first byte of its first element to the last byte of its last, with the gaps between them."""
        return self.span * self.torch_dtype.itemsize

    def difference(self, other: "TensorLayout") -> str | None:
        """How this tensor, the seed's, differs from the other, ours, in words; None if a fork can fill ours."""
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
    """One storage: its size in bytes, and its device in the process that described it."""

    nbytes: int
    device: str

    def __attrs_post_init__(self) -> None:
        if not (is_natural(self.nbytes) and is_text(self.device)):
            natural_field(self, fields_dict(StorageLayout)["nbytes"], self.nbytes)
            text_field(self, fields_dict(StorageLayout)["device"], self.device)


@frozen(repr=False)
class ModelLayout:
    """Every tensor and storage of one model. A tied tensor has several names, with equal storage and offset.

    Attributes:
        tensors: all that are published.
        storages: what they lie in.
        left_out: names of the model's other tensors, which were left out when it was published.
        identity: which model it is, if that was given.
        rank: which part of it, if that was given.
    """

    tensors: tuple[TensorLayout, ...]
    storages: tuple[StorageLayout, ...]
    left_out: tuple[str, ...] = ()
    identity: Identity | None = None
    rank: Rank | None = None

    def __attrs_post_init__(self) -> None:
        if len({tensor.name for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("a name stands twice in the layout")
        sizes = [storage.nbytes for storage in self.storages]
        for tensor in self.tensors:
            if tensor.storage >= len(sizes):
                raise ValueError(f"{tensor.name} lies in storage {tensor.storage} of {len(sizes)}")
            if tensor.offset + tensor.extent > sizes[tensor.storage]:
                raise ValueError(f"{tensor.name} reaches beyond its storage")
            if tensor.offset and tensor.offset % tensor.torch_dtype.itemsize:
                raise ValueError(f"{tensor.name} does not begin at a multiple of its element's size")

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: the size of a whole copy."""
        return sum(storage.nbytes for storage in self.storages)

    def first_names(self) -> dict[int, str]:
        """The name of the first tensor in each storage, by the storage's index."""
        return {tensor.storage: tensor.name for tensor in reversed(self.tensors)}

    def only(self, takes: Callable[[str], bool], check: Check = unchecked) -> tuple["ModelLayout", list[str]]:
        """The same layout with only the tensors whose names `takes` accepts, and the names of the others."""
        others = [tensor.name for tensor in looking(self.tensors, check) if not takes(tensor.name)]
        if not others:
            return self, []
        left = frozenset(others)
        return evolve(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name not in left)), others

    def __repr__(self) -> str:
        devices = ", ".join(sorted({storage.device for storage in self.storages})) or "nowhere"
        return (
            f"<ModelLayout {len(self.tensors):,} tensors in {len(self.storages):,} storages, "
            f"{self.nbytes / 1e9:.3f} GB on {devices}>"
        )


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these sizes and strides fill a range of memory without gaps or overlaps."""
    return (
        _fills(zip(reversed(stride), reversed(shape), strict=True))  # contiguous, as most are
        or _fills(sorted(zip(stride, shape, strict=True)))
        or 0 in shape
    )


def _fills(steps: Iterable[tuple[int, int]]) -> bool:
    """Whether dimensions of these (strides, sizes), the innermost first, have no gaps or overlaps."""
    expected = 1
    for step, size in steps:
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def plain_stride(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The stride, with the values that do not matter (sizes of one, empty tensors) as in a contiguous tensor."""
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


def _form(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, bool, int]:
    """How many elements there are with these sizes and strides, whether they are dense, and what they span."""
    numel, dense = _product(shape), is_dense(shape, stride)
    if dense:
        return numel, dense, numel
    span = 1
    for size, step in zip(shape, stride, strict=True):
        span += (size - 1) * step
    return numel, dense, span


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
