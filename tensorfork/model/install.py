"""The last step of a fork: meta tensors take their memory, all of them or none, and stay the same objects.

The content of each tensor is swapped with that of a tensor that has memory (`torch.utils.swap_tensors`). A tensor that
is made of others is swapped after these, with one rebuilt from what they become: its own device and shape cannot be
changed otherwise.

torch swaps a tensor only while nothing in torch refers to it, such as a view. So views that are in the model are
swapped first and release their old content. For any other reference `check_installable` refuses, before a byte moves.
"""

import copyreg
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.walk import inner_tensors


@frozen(eq=False, repr=False)
class TensorSwap:
    """One meta tensor, and the tensor with memory whose content it takes."""

    name: str
    old: torch.Tensor
    new: torch.Tensor


@frozen(eq=False, repr=False)
class Installation:
    """The swaps that give a model its memory. Made by `prepare`; `run` does them, once.

    Attributes:
        tensors: of tensors that are not made of others; views before what they are views of.
        wrappers: of tensors that are, the inner ones first.
    """

    tensors: Sequence[TensorSwap]
    wrappers: Sequence[TensorSwap]

    @classmethod
    def prepare(
        cls, replacements: Mapping[str, tuple[torch.Tensor, torch.Tensor]], wrappers: Mapping[str, torch.Tensor]
    ) -> "Installation":
        """Plan the swaps; rebuilds the wrappers from the new tensors.

        Args:
            replacements: meta tensors by name that passed `check_installable`, each with the tensor it becomes.
            wrappers: all tensors of the model that are made of others.

        Raises:
            UnsupportedTensor: a wrapper cannot be swapped or rebuilt. Nothing was changed.
        """
        becomes = {id(old): new for old, new in replacements.values()}
        tensors = [TensorSwap(name, old, new) for name, (old, new) in replacements.items()]
        tensors.sort(key=lambda swap: swap.old._base is None or id(swap.old._base) not in becomes)
        rebuilt: dict[int, TensorSwap] = {}
        for name, old in wrappers.items():
            if id(old) not in rebuilt and (new := _rebuild(name, old, becomes)) is not None:
                _check_swappable(name, old, 0)
                becomes[id(old)] = new
                rebuilt[id(old)] = TensorSwap(name, old, new)
        return cls(tensors, list(rebuilt.values()))

    def run(self) -> None:
        """Do all swaps. Raises `UnsupportedTensor` if torch refuses one; all tensors are then as they were."""
        undo: list[Callable[[], None]] = []
        with normal_mode():
            try:
                self._swap_all(undo)
            except BaseException:
                for undo_one in reversed(undo):
                    undo_one()
                raise

    def _swap_all(self, undo: list[Callable[[], None]]) -> None:
        swapped = {id(swap.old) for swap in self.tensors}
        for swap in self.tensors:
            base = swap.old._base
            if base is not None and id(base) in swapped:
                undo_view = _undo_of_view(swap, base)
                _run_swap(swap)
                undo.append(undo_view)
                _release_content(swap)
            else:
                _run_swap(swap)
                undo.append(lambda swap=swap: _swap_contents(swap.old, swap.new))  # type: ignore[misc]
        for swap in self.wrappers:
            _copy_attributes(swap.new, swap.old)
            _run_swap(swap)
            undo.append(lambda swap=swap: _swap_contents(swap.old, swap.new))  # type: ignore[misc]


def check_installable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `UnsupportedTensor` for a meta tensor among these that cannot take memory in place. Each is given once."""
    views = Counter(id(tensor._base) for tensor in tensors.values())
    for name, tensor in tensors.items():
        _check_swappable(name, tensor, views[id(tensor)])


def _check_swappable(name: str, tensor: torch.Tensor, views: int) -> None:
    """Raise where `swap_tensors` would once the tensor's views in the model, so many, are released."""
    graph = views + 1 if tensor.requires_grad else 0  # views refer to its node in autograd's graph as well
    if tensor._use_count() > 1 + views + graph:  # type: ignore[attr-defined]
        raise UnsupportedTensor(
            f"{name} is on the meta device and cannot take memory in place: a view that is not in the model, or a "
            "graph of computations, holds on to it. Let go of that first"
        )


def _rebuild(name: str, old: torch.Tensor, becomes: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """A tensor like this one, made of what its inner tensors become; None if none of them becomes another."""
    inner = inner_tensors(name, old)
    if not any(id(tensor) in becomes for tensor in inner.values()):
        return None
    if meta := [part for part, tensor in inner.items() if tensor.is_meta and id(tensor) not in becomes]:
        raise UnsupportedTensor(f"{name} is on the meta device and cannot take memory without its {meta[0]!r}")
    try:
        parts, context = old.__tensor_flatten__()  # type: ignore[attr-defined]
        new_inner = {part: becomes.get(id(getattr(old, part)), getattr(old, part)) for part in parts}
        new: torch.Tensor = type(old).__tensor_unflatten__(  # type: ignore[attr-defined]
            new_inner, context, old.size(), old.stride()
        )
        if new.is_leaf and new.requires_grad != old.requires_grad:
            new.requires_grad_(old.requires_grad)
    except Exception as error:  # the subclass's own code
        raise UnsupportedTensor(f"{name}: this {type(old).__name__} cannot be put together again: {error}") from error
    if type(new) is not type(old) or new.is_meta:
        raise UnsupportedTensor(f"{name}: this {type(old).__name__}, put together again, is another kind of tensor")
    return new


def like_original(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The new tensor's memory as a tensor with the old one's class, attributes and requires_grad."""
    if type(old) is torch.Tensor:
        made = new.requires_grad_(old.requires_grad)
    else:
        made = torch.Tensor._make_subclass(type(old), new, old.requires_grad)
    _copy_attributes(made, old)
    return made


def _copy_attributes(new: torch.Tensor, old: torch.Tensor) -> None:
    """Give the new tensor all attributes of the old one. Inner tensors among them must have their memory by now."""
    new.__dict__.clear()
    new.__dict__.update(old.__dict__)
    for slot in _slots(old):
        if hasattr(old, slot):
            setattr(new, slot, getattr(old, slot))


def _slots(tensor: torch.Tensor) -> Sequence[str]:
    slots: Sequence[str] = copyreg._slotnames(type(tensor))  # type: ignore[attr-defined]
    return slots


def _run_swap(swap: TensorSwap) -> None:
    try:
        _swap_contents(swap.old, swap.new)
    except RuntimeError as error:
        raise UnsupportedTensor(
            f"{swap.name} cannot take its memory in place: {error}. All are as they were."
        ) from error


def _swap_contents(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the content of two tensors that have one class and the same attributes."""
    if weakref.getweakrefcount(one):
        # swap_tensors refuses these. But they refer to the object, which stays: an LSTM has them to its own weights.
        torch._C._swap_tensor_impl(one, other)
    else:
        torch.utils.swap_tensors(one, other)


def _release_content(swap: TensorSwap) -> None:
    """After the swap of a view, release the view's old content, so that nothing refers to what it is a view of."""
    empty: Any = torch.empty(0, dtype=swap.new.dtype, device="meta")
    if type(swap.new) is not torch.Tensor:
        empty = torch.Tensor._make_subclass(type(swap.new), empty, False)
    torch.utils.swap_tensors(swap.new, empty)


def _undo_of_view(swap: TensorSwap, base: torch.Tensor) -> Callable[[], None]:
    """A function that makes the tensor, once swapped, the view of `base` again that it is now."""
    size, stride, offset, dtype = swap.old.size(), swap.old.stride(), swap.old.storage_offset(), swap.old.dtype

    def undo() -> None:
        view = torch.empty(0, dtype=dtype, device="meta").set_(base.untyped_storage(), offset, size, stride)
        _swap_contents(swap.old, like_original(swap.old, view))

    return undo


@contextmanager
def normal_mode() -> Iterator[None]:
    """Whatever mode the caller is in, tensors made inside are ordinary ones, and autograd does not record."""
    with torch.inference_mode(False), torch.no_grad():
        yield
