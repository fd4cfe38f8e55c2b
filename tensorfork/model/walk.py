"""What a model holds: every tensor, under a name that says where it is kept.

Parameters and buffers have their usual names. Tensors anywhere else on a module are found too, however deep: in plain
attributes (``layers.0.attn.w_kc``), lists and tuples (``scales[0]``), dicts (``cache['k']``), in the fields of
dataclasses, attrs classes and any other object (``quant_method.scale``), in modules among those, and in the attributes
of tensors themselves (``weight.quant_state.absmax``). Of a tensor subclass made of other tensors, the inner ones are
found (``weight.qdata``); of a `DTensor`, the local shard, under the name of the whole.

Names are given breadth first, from the registered modules outwards, attributes in alphabetical order. An object that
can be reached in several ways is named once, after the shortest way, so cycles end. A tensor gets every name it can be
reached by, so that ties show.

No code of the model is run: the walk reads instance dictionaries and slots, never properties or ``__getattr__``. It
does not enter gradients, optimizers, hooks, functions and their closures, classes and their attributes, or the
machinery of torch (graphs, compiled code, process groups) and of Python.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.entries import (
    BUILT_IN_COLLECTIONS,
    DTENSOR_INTERNALS,
    dictionary_of,
    element_suffixes,
    elements_of,
    inner_tensors,
    items_of,
    join,
    key_text,
    parent_of,
    slots_of,
)
from tensorfork.model.kinds import (
    ATOM,
    MAPPING,
    MODULE,
    PLAIN_TENSORS,
    PLAIN_VALUES,
    SCRIPTED,
    SEQUENCE,
    SET,
    TENSOR,
    Classifier,
    internals_of,
    is_dtensor,
)
from tensorfork.model.selection import Selection
from tensorfork.placement import Placement

Holder = tuple[str, Any, Any, Any]
"""A name, a mapping or sequence that holds something under it, the key or index there, and what it holds."""


@frozen(eq=False, repr=False)
class Visited:
    """The objects that a walk has walked into, in order, each with its first name; the tensors; and what was selected.

    `tensorfork.model.values` reads what they hold beside the tensors.
    """

    objects: Sequence[tuple[str, Any]]
    tensors: Mapping[str, torch.Tensor]
    selection: Selection


@frozen(eq=False, repr=False)
class FoundTensors:
    """What a walk found.

    Attributes:
        tensors: by name, none of them made of others; a tied one under each of its names.
        placements: of those that are shards.
        wrappers: the tensors that are made of these, by name, the inner ones first.
        left_out: names that the selection leaves out, of tensors that have no selected name either.
        holders: what holds the tensors, and what leads to them: (name, container, key, value), so that
            ``container[key] is value`` says later whether that is still so. Slots are not among them.
        visited: what was walked into; None for a mapping of tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    placements: Mapping[str, Placement]
    wrappers: Mapping[str, torch.Tensor]
    left_out: tuple[str, ...]
    holders: Sequence[Holder]
    visited: Visited | None = None


def walk(model: Any, selection: Selection | None = None) -> FoundTensors:
    """Every tensor of an `nn.Module`; or those of a mapping of names to tensors, and nothing beyond them.

    Raises:
        TypeError: it is neither.
        ValueError: a pattern that the selection includes matches no tensor.
        UnsupportedTensor: tensors are held where they have no name or cannot be reached; the message says where.
    """
    selection = selection or Selection()
    walker = _Walker(selection, {})
    if isinstance(model, torch.nn.Module):
        walker.visit(("",), model)
    elif isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"a mapping must be of names (str) to tensors; it has {name!r}: {type(tensor).__name__}"
                )
            walker.add_tensor((name,), tensor)
            walker.hold(name, model, name, tensor)
    else:
        raise TypeError(f"{type(model).__name__} is not a model; give an nn.Module, or a mapping of names to tensors")
    walker.run()
    if unmatched := selection.unmatched([*walker.tensors]):
        raise ValueError(f"include={unmatched[0]!r} means no tensor of this model")
    left_out = tuple(dict.fromkeys(walker.left_out()))
    holders = walker.holders()
    visited = Visited(walker.visited, walker.tensors, selection) if isinstance(model, torch.nn.Module) else None
    return FoundTensors(walker.tensors, walker.placements, walker.wrappers, left_out, holders, visited)


_UNORDERED = "a set has no order, so its tensors have no names; keep them in a list or a dict, or exclude them"
_SCRIPTED = (
    "torch.jit keeps tensors where they cannot be found; publish the plain module, or a mapping of its tensors, or "
    "exclude it"
)


class _Walker:
    """One walk.

    Args:
        selection: which tensors to take.
        seen: the objects that have a name already, by id; kept alive so that no id is used twice.
    """

    def __init__(self, selection: Selection, seen: dict[int, Any]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.placements: dict[str, Placement] = {}
        self.wrappers: dict[str, torch.Tensor] = {}
        self.visited: list[tuple[str, Any]] = []
        self._holders: list[Holder] = []
        self._scripted: list[str] = []
        self._selection, self._selects_all, self._seen = selection, selection.is_all, seen
        self._queue: deque[tuple[Sequence[str], Any]] = deque()
        self._deferred: list[tuple[Sequence[str], Any, str | None]] = []
        """What is not walked before all else is: excluded objects (None), and those that may hold no tensor that has no
        name elsewhere, each with the reason."""
        self._unselected: list[tuple[str, torch.Tensor]] = []
        self._leaves: dict[int, list[tuple[str, torch.Tensor, Placement | None]]] = {}
        self._attributes_visited: set[int] = set()
        classifier = Classifier()
        self._kind_of, self._fields_of = classifier.kind_of, classifier.fields_of

    def visit(self, paths: Sequence[str], value: Any) -> None:
        """Name a tensor, or queue what may hold some. `paths` are all its names."""
        kind = self._kind_of(type(value))
        if kind == ATOM:
            return
        if self._selection.exclude:
            if excluded := [path for path in paths if self._selection.excludes(path)]:
                self._deferred.append((excluded, value, None))
                paths = [path for path in paths if path not in excluded]
            if not paths:
                return
        if kind == TENSOR:
            self.add_tensor(paths, value)
            self._visit_tensor_attributes(paths, value)
        elif kind == SET:
            self._deferred.append((paths, value, _UNORDERED))
        elif kind == SCRIPTED:
            self._deferred.append((paths, value, _SCRIPTED))
        else:
            self._queue.append((paths, value))

    def run(self) -> None:
        """Walk into everything queued, and what that leads to."""
        while self._queue:
            paths, value = self._queue.popleft()
            if id(value) in self._seen:
                continue
            kind = self._kind_of(type(value))
            if kind == MODULE:
                self._visit_modules(paths, value)
                continue
            self._seen[id(value)] = value
            self.visited.append((paths[0], value))
            if kind == MAPPING:
                self._visit_items(paths, value)
            elif kind == SEQUENCE:
                self._visit_elements(paths, value)
            elif kind == SET:
                for i, element in enumerate(elements_of(value)):
                    self.visit([f"{path}{{{i}}}" for path in paths], element)
            if type(value) not in BUILT_IN_COLLECTIONS:
                self._visit_attributes(paths, value)

    def left_out(self) -> Iterator[str]:
        """The names of what the selection leaves out.

        Raises `UnsupportedTensor` for tensors that only a set or a scripted module holds.
        """
        taken = {id(tensor) for tensor in self.tensors.values()}
        yield from (name for name, tensor in self._unselected if id(tensor) not in taken)
        for paths, value, why_not in self._deferred:
            inside = _Walker(Selection(), self._seen)
            inside._walk_deferred(paths, value)
            missed = [name for name, tensor in inside.tensors.items() if id(tensor) not in taken]
            missed += inside._scripted
            if why_not is None:
                yield from missed
            elif missed:
                raise UnsupportedTensor(f"{paths[0] or 'the model'}: {why_not}")

    def holders(self) -> list[Holder]:
        """The holders of what was selected, and of what leads to that."""
        selected = {id(tensor) for tensors in (self.tensors, self.wrappers) for tensor in tensors.values()}
        leading: set[str] = set()
        parents = {parent_of(name) if "[" in name else name.rpartition(".")[0] for name in self.tensors}
        while parents := parents - leading:
            leading |= parents
            parents = {parent_of(name) for name in parents}
        return [
            one for one in self._holders if id(one[3]) in selected or (one[0] in leading and id(one[3]) in self._seen)
        ]

    def _walk_deferred(self, paths: Sequence[str], value: Any) -> None:
        """Walk all of a deferred object: sets too, in any order. Scripted modules are listed in `_scripted`."""
        self.visit(paths, value)
        while self._deferred or self._queue:
            self.run()
            if self._deferred:
                paths, value, why_not = self._deferred.pop(0)
                if why_not == _SCRIPTED:
                    self._scripted.append(paths[0])
                else:
                    self._queue.append((paths, value))

    def add_tensor(self, paths: Sequence[str], tensor: torch.Tensor) -> None:
        """Record a tensor, or those that it is made of, under these names."""
        if type(tensor) in PLAIN_TENSORS and self._selects_all:
            for path in paths:
                self._record(path, tensor, None)
            return
        leaves = self._leaves.get(id(tensor))
        if leaves is None:
            leaves = self._leaves_of(paths[0], tensor)
        is_wrapper = not leaves or leaves[0][1] is not tensor
        for path in paths:
            if self._selection.excludes(path):
                self._deferred.append(((path,), tensor, None))
                continue
            if is_wrapper:
                self.wrappers[path] = tensor
            for suffix, leaf, placement in leaves:
                self._record(path + suffix, leaf, placement)

    def hold(self, name: str, container: Any, key: Any, value: Any) -> None:
        """Record what holds a value."""
        if self._kind_of(type(value)) != ATOM:
            self._holders.append((name, container, key, value))

    def _record(self, name: str, tensor: torch.Tensor, placement: Placement | None) -> None:
        if not self._selects_all and not self._selection.selects(name):
            self._unselected.append((name, tensor))
            return
        known = self.tensors.setdefault(name, tensor)
        if known is not tensor:
            raise UnsupportedTensor(f"{name}: two tensors of the model go by this name; rename or exclude one")
        if placement is not None:
            self.placements[name] = placement

    def _leaves_of(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor, Placement | None]]:
        """The tensors that a tensor is made of, with suffixes to its name: itself, or a subclass's inner ones."""
        cls: type = type(tensor)
        if cls in PLAIN_TENSORS or not is_traceable_wrapper_subclass_type(cls):
            return [("", tensor, None)]
        found: list[tuple[str, torch.Tensor, Placement | None]] = []
        if is_dtensor(cls):
            local, placement = tensor._local_tensor, Placement.of(tensor)  # type: ignore[attr-defined]
            found = [(suffix, leaf, placement) for suffix, leaf, _ in self._leaves_of(name, local)]
            if id(local) in self._leaves:
                self.wrappers[f"{name} (local)"] = local
        else:
            for part, inner in inner_tensors(name, tensor).items():
                leaves = self._leaves_of(f"{name}.{part}", inner)
                if id(inner) in self._leaves:
                    self.wrappers[f"{name}.{part}"] = inner
                found += [(f".{part}{suffix}", leaf, placement) for suffix, leaf, placement in leaves]
        self._leaves[id(tensor)] = found
        self._seen[id(tensor)] = tensor
        return found

    def _visit_modules(self, paths: Sequence[str], root: torch.nn.Module) -> None:
        """A module and all registered below it, as `named_parameters` and `named_buffers` would name their tensors."""
        listed: list[tuple[str, torch.nn.Module]] = []
        for path in paths:
            self._list_modules(path, root, listed, set())
        modules: dict[int, tuple[torch.nn.Module, list[str]]] = {}
        for path, module in listed:
            modules.setdefault(id(module), (module, []))[1].append(path)
        with_attributes: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for registry in ("_parameters", "_buffers"):
            for path, module in listed:
                registered = module.__dict__.get(registry)
                for key, tensor in list(registered.items()) if registered else ():
                    if tensor is not None:
                        name = join(path, key)
                        self.add_tensor((name,), tensor)
                        self._holders.append((name, registered, key, tensor))
                        if tensor.__dict__ or type(tensor) not in PLAIN_TENSORS:
                            with_attributes.setdefault(id(tensor), (tensor, []))[1].append(name)
        self._seen.update((id(module), module) for module, _ in modules.values())
        for tensor, names in with_attributes.values():
            self._visit_tensor_attributes(names, tensor)
        self.visited += [(names[0], module) for module, names in modules.values()]
        for module, names in modules.values():
            self._visit_attributes(names, module, internals_of(module))

    def _list_modules(
        self, path: str, module: torch.nn.Module, listed: list[tuple[str, torch.nn.Module]], above: set[int]
    ) -> None:
        """Append a module and those registered below it, depth first; `above` are the ids of those it lies in."""
        if id(module) in self._seen or id(module) in above:
            return
        if self._kind_of(type(module)) == SCRIPTED:
            self.visit((path,), module)
            return
        listed.append((path, module))
        if children := module.__dict__.get("_modules"):
            above.add(id(module))
            for key, child in list(children.items()):
                if child is not None:
                    name = join(path, key)
                    self.hold(name, children, key, child)
                    self._list_modules(name, child, listed, above)
            above.remove(id(module))

    def _visit_tensor_attributes(self, paths: Sequence[str], tensor: torch.Tensor) -> None:
        if (tensor.__dict__ or type(tensor) not in PLAIN_TENSORS) and id(tensor) not in self._attributes_visited:
            self._attributes_visited.add(id(tensor))
            self.visited.append((paths[0], tensor))
            self._visit_attributes(paths, tensor, DTENSOR_INTERNALS if is_dtensor(type(tensor)) else frozenset())

    def _visit_attributes(self, paths: Sequence[str], owner: Any, skipped: frozenset[str] = frozenset()) -> None:
        """Visit the values in an object's dictionary and slots, but for the skipped keys."""
        fields = dictionary, slots = self._fields_of(type(owner))
        held = dictionary_of(owner, fields) if dictionary is None else dictionary.__get__(owner)
        has_own = len(held) > len(skipped) or not skipped.issuperset(list(held))  # most modules have none
        values = list(held.items()) if has_own else ()  # a list, made at once: a model may be in use
        found = [(k, v) for k, v in values if type(v) not in PLAIN_VALUES and isinstance(k, str) and k not in skipped]
        if slots:
            found += [(k, v) for k, v in slots_of(owner, fields) if k not in skipped]
        for key, value in sorted(found, key=lambda item: item[0]):
            names = [join(path, key) for path in paths]
            if key in held:
                self.hold(names[0], held, key, value)
            self.visit(names, value)

    def _visit_items(self, paths: Sequence[str], mapping: Any) -> None:
        for i, (key, value) in enumerate(items_of(mapping)):
            if type(value) not in PLAIN_VALUES:
                text = key_text(key) or f"#{i}"
                names = [f"{path}[{text}]" for path in paths]
                self.hold(names[0], mapping, key, value)
                self.visit(names, value)

    def _visit_elements(self, paths: Sequence[str], sequence: Any) -> None:
        elements = elements_of(sequence)
        named = element_suffixes(sequence, len(elements))
        for i, value in enumerate(elements):
            if type(value) not in PLAIN_VALUES:
                suffix = named[i] if named else f"[{i}]"
                self.hold(paths[0] + suffix, sequence, i, value)
                self.visit([path + suffix for path in paths], value)
