"""The last step of a fork: meta tensors take their memory, all of them or none, and stay the same objects.

The content of each tensor is swapped with that of a tensor that has memory, as `torch.utils.swap_tensors` does it. A
tensor that is made of others is swapped too, with one rebuilt from what they become: its own device and shape cannot be
changed otherwise.

What else in torch refers to a content, such as a view or a graph of computations, would not notice the swap. Views that
are in the model are swapped with it. For any other reference a swap is refused: by `check_installable` before a byte
moves, and again before the first swap.

All swaps are one call of a C function, which runs no Python code: an interrupt, another thread and a trace function see
the model before it or after it.
"""

import copyreg
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import call
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.causes import held_by
from tensorfork.model.entries import inner_tensors
from tensorfork.model.value_writes import ValueWrite


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
        tensors: of tensors that are not made of others.
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
        rebuilt: dict[int, TensorSwap] = {}
        for name, old in wrappers.items():
            if id(old) not in rebuilt and (new := _rebuild(name, old, becomes)) is not None:
                _check_swappable(name, old, 0)
                becomes[id(old)] = new
                rebuilt[id(old)] = TensorSwap(name, old, new)
        return cls(tensors, list(rebuilt.values()))

    def run(self, values: Sequence[ValueWrite] = ()) -> None:
        """Do all swaps, and write these values. Raises `UnsupportedTensor` if torch refuses one.

        All is then as it was.
        """
        swaps = [*self.tensors, *self.wrappers]
        with torch._C.DisableTorchFunctionSubclass():
            graphs = self._check(swaps)
            contents = [swap.old._cdata for swap in swaps]
            try:
                _swap_all(swaps, [value.do for value in values])
            except BaseException:
                # whatever was done: what has another content than before gets that back
                swapped = [one for one, content in zip(swaps, contents, strict=True) if one.old._cdata != content]
                _swap_all(swapped, [value.undo for value in values])
                raise
        for node in graphs:
            node.register_prehook(_refuse_backward)

    def _check(self, swaps: Sequence[TensorSwap]) -> list[Any]:
        """Raise `UnsupportedTensor` for a tensor that cannot be swapped now.

        Returns autograd's nodes for the gradients of those that a graph refers to. It refers to the old content, and
        its backward pass must not be run.
        """
        views = _count_views([swap.old for swap in self.tensors])
        nodes = []
        for swap in swaps:
            references, node = _other_references(swap.old, views[id(swap.old)])
            if references:
                raise _refusal(swap, "a view that is not in the model, or a graph of computations, holds on to it")
            if node is not None:
                nodes.append(node)
        try:
            _swap_all([one for swap in swaps for one in (swap, swap)])  # there and back
        except RuntimeError:
            for swap in swaps:
                try:
                    _swap_all([swap, swap])
                except RuntimeError as error:
                    raise _refusal(swap, str(error)) from error
            raise
        return nodes


def _refusal(swap: TensorSwap, reason: str) -> UnsupportedTensor:
    return UnsupportedTensor(f"{swap.name} cannot take its memory in place: {reason}. All are as they were.")


def _swap_all(swaps: Sequence[TensorSwap], calls: Sequence[Callable[[], object]] = ()) -> None:
    """Swap contents, in order, and call C functions, in one call of a C function.

    Raises `RuntimeError` where torch refuses a swap.

    The objects keep their classes and attributes, and Python's weak references to them stay valid.
    """
    old, new = [swap.old for swap in swaps], [swap.new for swap in swaps]
    deque(chain(map(torch._C._swap_tensor_impl, old, new), map(call, calls)), maxlen=0)


def check_installable(tensors: Mapping[str, torch.Tensor], model: Any = None) -> None:
    """Raise `UnsupportedTensor` for a meta tensor among these that cannot take memory in place. Each is given once.

    `model` is the module that holds them, if any; its hooks may say why.
    """
    views = _count_views(tensors.values())
    for name, tensor in tensors.items():
        _check_swappable(name, tensor, views[id(tensor)], model)


def _check_swappable(name: str, tensor: torch.Tensor, views: int, model: Any = None) -> None:
    if _other_references(tensor, views)[0]:
        cause = held_by(model, name) or (
            "a view that is not in the model, or a graph of computations, holds on to it. Let go of that first"
        )
        raise UnsupportedTensor(f"{name} is on the meta device and cannot take memory in place: {cause}")


def _count_views(tensors: Iterable[torch.Tensor]) -> Counter[int]:
    """How many of these are views of a tensor, by its id."""
    return Counter(id(base) for tensor in tensors if (base := tensor._base) is not None)


def _other_references(tensor: torch.Tensor, views: int) -> tuple[int, Any]:
    """How many references torch holds to a tensor's content, beyond those of the object and of so many views.

    Not among them is that of autograd's node for a leaf's gradient. It is returned where there is one: a graph ends
    there, perhaps that of a view.
    """
    before: int = tensor._use_count()  # type: ignore[attr-defined]
    references = before - 1 - views
    if references and tensor.is_leaf and tensor.requires_grad:
        node = torch.autograd.graph.get_gradient_edge(tensor).node  # it is made where there was none, and refers too
        if tensor._use_count() == before:  # type: ignore[attr-defined]
            return references - 1, node
    return references, None


def _refuse_backward(_: Any) -> None:
    """What autograd's node calls that belongs to a content which the tensor has no longer."""
    raise RuntimeError(
        "this graph was made while the tensor was on the meta device, before a fork gave it memory; run forward again"
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
            new_inner, context, old.size(), _outer_stride(old, inner, becomes)
        )
        if new.is_leaf and new.requires_grad != old.requires_grad:
            new.requires_grad_(old.requires_grad)
    except Exception as error:  # the subclass's own code
        raise UnsupportedTensor(f"{name}: this {type(old).__name__} cannot be put together again: {error}") from error
    if type(new) is not type(old) or new.is_meta:
        raise UnsupportedTensor(f"{name}: this {type(old).__name__}, put together again, is another kind of tensor")
    return new


def _outer_stride(
    old: torch.Tensor, inner: Mapping[str, torch.Tensor], becomes: Mapping[int, torch.Tensor]
) -> tuple[int, ...]:
    """The stride of a tensor that is made of others: that of an inner one, where it was like that inner one before."""
    for part in inner.values():
        if id(part) in becomes and (part.shape, part.stride()) == (old.shape, old.stride()):
            return becomes[id(part)].stride()
    return old.stride()


def like_original(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The new tensor's memory as a tensor with the old one's class, attributes and requires_grad.

    The class of a tensor that is made of this one may ask for them when it is rebuilt.
    """
    kind = type(old)
    if kind is torch.Tensor:
        made = new.requires_grad_(old.requires_grad)
    else:
        made = torch.Tensor._make_subclass(kind, new, old.requires_grad)
    if old.__dict__:
        made.__dict__.update(old.__dict__)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        for slot in copyreg._slotnames(kind):  # type: ignore[attr-defined]
            if hasattr(old, slot):
                setattr(made, slot, getattr(old, slot))
    return made
