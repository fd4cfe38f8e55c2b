"""The last step of a fork: meta tensors take their memory, all or none, and stay the same objects.

What is in a tensor is exchanged with what is in one that has memory (`torch.utils.swap_tensors`). A tensor that is made
of others is exchanged, after them, with one that was made anew of what they become: its own idea of where it is cannot
be changed otherwise.

torch exchanges what is in a tensor only if nothing in torch holds on to it, such as a view. Views that are in the model
too come first, and what was in them is let go of; for all else `prepare` refuses, before a byte moves.
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


@frozen
class TensorSwap:
    """One meta tensor, and the one it becomes."""

    name: str
    old: torch.Tensor
    new: torch.Tensor


@frozen
class Installation:
    """What is to take memory. Made by `prepare`; done by `run`, once.

    Attributes:
        tensors: those that are not made of others; views before what they are views of.
        wrappers: those that are, the inner ones first.
    """

    tensors: Sequence[TensorSwap]
    wrappers: Sequence[TensorSwap]

    @classmethod
    def prepare(
        cls, made: Mapping[str, tuple[torch.Tensor, torch.Tensor]], wrappers: Mapping[str, torch.Tensor]
    ) -> "Installation":
        """For meta tensors by name that passed `check_installable`, each with what it becomes, and all tensors of the model that
        are made of others.

        Raises `UnsupportedTensor` for one of these that cannot be exchanged, or not be made anew.
        """
        becomes = {id(old): new for old, new in made.values()}
        tensors = [TensorSwap(name, old, new) for name, (old, new) in made.items()]
        tensors.sort(key=lambda one: one.old._base is None or id(one.old._base) not in becomes)
        rebuilt: dict[int, TensorSwap] = {}
        for name, old in wrappers.items():
            if id(old) not in rebuilt and (new := _rebuild(name, old, becomes)) is not None:
                _check(name, old, 0)
                becomes[id(old)] = new
                rebuilt[id(old)] = TensorSwap(name, old, new)
        return cls(tensors, list(rebuilt.values()))

    def run(self) -> None:
        """Exchange them. Raises `UnsupportedTensor` if one refuses; all are as they were, then."""
        with normal_mode():
            self._run()

    def _run(self) -> None:
        undo: list[Callable[[], None]] = []
        mine = {id(one.old) for one in self.tensors}
        try:
            for one in self.tensors:
                base = one.old._base
                if base is not None and id(base) in mine:
                    restore = _restoring(one, base)
                    _swap(one.name, one.old, one.new)
                    undo.append(restore)
                    _empty(one)
                else:
                    _swap(one.name, one.old, one.new)
                    undo.append(lambda one=one: _exchange(one.old, one.new))  # type: ignore[misc]
            for one in self.wrappers:
                _copy_attributes(one.new, one.old)
                _swap(one.name, one.old, one.new)
                undo.append(lambda one=one: _exchange(one.old, one.new))  # type: ignore[misc]
        except BaseException:
            for back in reversed(undo):
                back()
            raise


def check_installable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `UnsupportedTensor` for a meta tensor among these that cannot take memory in place. Each is given once."""
    views = Counter(id(tensor._base) for tensor in tensors.values())
    for name, tensor in tensors.items():
        _check(name, tensor, views[id(tensor)])


def _check(name: str, tensor: torch.Tensor, views: int) -> None:
    """Refuse what `swap_tensors` will."""
    graph = views + 1 if tensor.requires_grad else 0  # views hold on to its place in the graph as well
    if tensor._use_count() > 1 + views + graph:  # type: ignore[attr-defined]
        raise UnsupportedTensor(
            f"{name} is on the meta device and cannot take memory in place: a view that is not in the model, or a "
            "graph of computations, holds on to it. Let go of that first"
        )


def _rebuild(name: str, old: torch.Tensor, becomes: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    """A tensor like this one, made of what its inner tensors become; None if none of them becomes anything."""
    inner = inner_tensors(name, old)
    if not any(id(one) in becomes for one in inner.values()):
        return None
    if left := [part for part, one in inner.items() if one.is_meta and id(one) not in becomes]:
        raise UnsupportedTensor(f"{name} is on the meta device and cannot take memory without its {left[0]!r}")
    try:
        parts, context = old.__tensor_flatten__()  # type: ignore[attr-defined]
        whole = {part: becomes.get(id(getattr(old, part)), getattr(old, part)) for part in parts}
        made: torch.Tensor = type(old).__tensor_unflatten__(  # type: ignore[attr-defined]
            whole, context, old.size(), old.stride()
        )
        if made.is_leaf and made.requires_grad != old.requires_grad:
            made.requires_grad_(old.requires_grad)
    except Exception as error:  # the subclass's own code
        raise UnsupportedTensor(f"{name}: this {type(old).__name__} cannot be put together again: {error}") from error
    if type(made) is not type(old) or made.is_meta:
        raise UnsupportedTensor(f"{name}: this {type(old).__name__}, put together again, is another kind of tensor")
    return made


def _copy_attributes(new: torch.Tensor, old: torch.Tensor) -> None:
    """Give it all attributes of the old one: its inner tensors are the model's own, which have their memory by now."""
    new.__dict__.clear()
    new.__dict__.update(old.__dict__)
    for slot in _slots(old):
        if hasattr(old, slot):
            setattr(new, slot, getattr(old, slot))


def _slots(tensor: torch.Tensor) -> Sequence[str]:
    slots: Sequence[str] = copyreg._slotnames(type(tensor))  # type: ignore[attr-defined]
    return slots


def _swap(name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    try:
        _exchange(old, new)
    except RuntimeError as error:
        raise UnsupportedTensor(f"{name} cannot take its memory in place: {error}. All are as they were.") from error


def _exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """What is in two tensors of one class with the same attributes."""
    if weakref.getweakrefcount(one):
        # swap_tensors refuses these. But they are to the object, which stays: an LSTM has them to its own weights.
        torch._C._swap_tensor_impl(one, other)
    else:
        torch.utils.swap_tensors(one, other)


def _empty(one: TensorSwap) -> None:
    """Let go of what was in a view, so that what it was a view of is free."""
    nothing: Any = torch.empty(0, dtype=one.new.dtype, device="meta")
    if type(one.new) is not torch.Tensor:
        nothing = torch.Tensor._make_subclass(type(one.new), nothing, False)
    torch.utils.swap_tensors(one.new, nothing)


def like_original(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The new tensor in the old one's clothes: class, attributes, requires_grad."""
    if type(old) is torch.Tensor:
        made = new.requires_grad_(old.requires_grad)
    else:
        made = torch.Tensor._make_subclass(type(old), new, old.requires_grad)
    _copy_attributes(made, old)
    return made


def _restoring(one: TensorSwap, base: torch.Tensor) -> Callable[[], None]:
    """How to make it the same view again."""
    size, stride, offset, dtype = one.old.size(), one.old.stride(), one.old.storage_offset(), one.old.dtype

    def restore() -> None:
        view = torch.empty(0, dtype=dtype, device="meta").set_(base.untyped_storage(), offset, size, stride)
        _exchange(one.old, like_original(one.old, view))

    return restore


@contextmanager
def normal_mode() -> Iterator[None]:
    """Whatever the caller's mode: tensors made inside are ordinary ones, and making them is not recorded."""
    with torch.inference_mode(False), torch.no_grad():
        yield
