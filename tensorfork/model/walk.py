"""What a model holds: every tensor, under a name that says where.

Parameters and buffers go by their usual names. So do tensors anywhere else on a module, however deep: in plain
attributes (``layers.0.attn.w_kc``), lists and tuples (``scales[0]``), dicts (``cache['k']``), in the fields of
dataclasses, attrs classes and any other object (``quant_method.scale``), in modules among those, and in the attributes
of tensors themselves (``weight.quant_state.absmax``). Of a tensor subclass made of other tensors, the inner ones are
found (``weight.qdata``); of a `DTensor`, the local shard, under the name of the whole.

Names are given breadth first, from the registered modules outwards, attributes in alphabetical order: an object that
can be reached in several ways is named after the shortest, once, so cycles end. A tensor gets every name it can be
reached by, so that ties show.

Nothing of the model's is run: instance dictionaries and slots are read, properties are not, nor is anything computed
by ``__getattr__``. Not the model's, and not walked: gradients, optimizers, hooks, functions and what they close over,
classes and what lies on them, the machinery of torch (graphs, compiled code, process groups) and of Python.
"""

import enum
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from tensorfork.errors import UnsupportedTensor
from tensorfork.model.selection import Selection
from tensorfork.placement import Placement


@frozen
class FoundTensors:
    """What a walk found.

    Attributes:
        tensors: by name, none of them made of others; a tied one under each of its names.
        placements: of those that are shards.
        wrappers: the tensors that are made of these, by name, the inner ones first.
        left_out: the names of what the selection leaves out, and no other name stands for.
    """

    tensors: Mapping[str, torch.Tensor]
    placements: Mapping[str, Placement]
    wrappers: Mapping[str, torch.Tensor]
    left_out: tuple[str, ...]


def walk(model: Any, selection: Selection | None = None) -> FoundTensors:
    """Every tensor of an `nn.Module`; or those of a mapping of names to tensors, and nothing beyond them.

    Raises:
        TypeError: it is neither.
        ValueError: the selection includes a name that there is not.
        UnsupportedTensor: tensors are held where they have no name or cannot be reached; the message says where.
    """
    selection = selection or Selection()
    walking = _Walk(selection, {})
    if isinstance(model, torch.nn.Module):
        walking.reach(("",), model)
    elif isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"a mapping must be of names (str) to tensors; it has {name!r}: {type(tensor).__name__}"
                )
            walking.name((name,), tensor)
    else:
        raise TypeError(f"{type(model).__name__} is not a model; give an nn.Module, or a mapping of names to tensors")
    walking.run()
    if unused := selection.unused([*walking.tensors]):
        raise ValueError(f"include={unused[0]!r} means no tensor of this model")
    left_out = tuple(dict.fromkeys(walking.finish()))
    return FoundTensors(walking.tensors, walking.placements, walking.wrappers, left_out)


_ATOM, _TENSOR, _MODULE, _MAPPING, _SEQUENCE, _SET, _OPAQUE, _OBJECT = range(8)

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SIMPLE = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_EXACT = (list, tuple, dict, deque, set, frozenset)
_INTERNAL = frozenset(torch.nn.Module().__dict__)
"""What `nn.Module` itself keeps on an instance: parameters, buffers and modules, which have their names, and hooks."""
_LOCAL = frozenset({"_local_tensor"})
_NONE: Mapping[str, Any] = {}
_NEVER = (type, enum.Enum, BaseException, types.ModuleType, torch.optim.Optimizer)
# fmt: off
_MACHINERY = frozenset((
    "_thread", "abc", "accelerate", "asyncio", "builtins", "concurrent", "contextlib", "contextvars", "ctypes",
    "functools", "importlib", "inspect", "io", "logging", "multiprocessing", "numpy", "operator", "pathlib", "queue",
    "re", "socket", "subprocess", "threading", "triton", "types", "typing", "unittest", "weakref",
))
# fmt: on
"""Packages whose objects are no part of a model. Not the whole standard library: a caller's module that is called
like one of its lesser ones would be skipped, and nobody told."""
_TORCH_DATA = ("torch.nn.", "torch.ao.", "torch.distributions.")
"""Where in torch objects are part of a model; elsewhere they are its machinery."""
_UNORDERED = "a set has no order, so its tensors have no names; keep them in a list or a dict, or exclude them"
_SCRIPTED = (
    "torch.jit keeps tensors where they cannot be found; publish the plain module, or a mapping of its tensors, or "
    "exclude it"
)


class _Walk:
    """One walk. `seen` is what has a name already, kept alive so that no id is used twice."""

    def __init__(self, selection: Selection, seen: dict[int, Any]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.placements: dict[str, Placement] = {}
        self.wrappers: dict[str, torch.Tensor] = {}
        self.opaque: list[str] = []
        self._selection, self._takes_all, self._seen = selection, selection.is_all, seen
        self._queue: deque[tuple[Sequence[str], Any]] = deque()
        self._later: list[tuple[Sequence[str], Any, str | None]] = []
        self._left: list[tuple[str, torch.Tensor]] = []
        self._leaves: dict[int, list[tuple[str, torch.Tensor, Placement | None]]] = {}
        self._searched: set[int] = set()
        self._kinds: dict[type, int] = {}
        self._fields: dict[type, tuple[Any, list[tuple[str, Any]]]] = {}

    def reach(self, paths: Sequence[str], value: Any) -> None:
        """Something is here, under these names."""
        kind = self._kind_of(type(value))
        if kind == _ATOM:
            return
        if self._selection.exclude:
            if out := [path for path in paths if self._selection.excludes(path)]:
                self._later.append((out, value, None))
                paths = [path for path in paths if path not in out]
            if not paths:
                return
        if kind == _TENSOR:
            self.name(paths, value)
            self._attributes_of_tensor(paths, value)
        elif kind == _SET:
            self._later.append((paths, value, _UNORDERED))
        elif kind == _OPAQUE:
            self._later.append((paths, value, _SCRIPTED))
        else:
            self._queue.append((paths, value))

    def run(self) -> None:
        """Go where the things reached lead."""
        while self._queue:
            paths, value = self._queue.popleft()
            if id(value) in self._seen:
                continue
            kind = self._kind_of(type(value))
            if kind == _MODULE:
                self._modules(paths, value)
                continue
            self._seen[id(value)] = value
            if kind == _MAPPING:
                self._items(paths, value)
            elif kind == _SEQUENCE:
                self._elements(paths, value)
            elif kind == _SET:
                for i, element in enumerate(_elements_of(value)):
                    self.reach([f"{path}{{{i}}}" for path in paths], element)
            if type(value) not in _EXACT:
                self._attributes(paths, value)

    def finish(self) -> Iterator[str]:
        """The names of what is left out. Raises `UnsupportedTensor` for what may not be."""
        taken = {id(tensor) for tensor in self.tensors.values()}
        yield from (name for name, tensor in self._left if id(tensor) not in taken)
        for paths, value, why_not in self._later:
            rest = _Walk(Selection(), self._seen)
            rest.unfold(paths, value)
            lost = [name for name, tensor in rest.tensors.items() if id(tensor) not in taken]
            lost += rest.opaque
            if why_not is None:
                yield from lost
            elif lost:
                raise UnsupportedTensor(f"{paths[0] or 'the model'}: {why_not}")

    def unfold(self, paths: Sequence[str], value: Any) -> None:
        """Walk what was put off: sets in any order, and what nobody can look into by its name."""
        self.reach(paths, value)
        while self._later or self._queue:
            self.run()
            if self._later:
                paths, value, why_not = self._later.pop(0)
                if why_not == _SCRIPTED:
                    self.opaque.append(paths[0])
                else:
                    self._queue.append((paths, value))

    def name(self, paths: Sequence[str], tensor: torch.Tensor) -> None:
        """A tensor is here, under these names."""
        if type(tensor) in _PLAIN and self._takes_all:
            for path in paths:
                self._put(path, tensor, None)
            return
        leaves = self._leaves.get(id(tensor))
        if leaves is None:
            leaves = self._leaves_of(paths[0], tensor)
        wraps = not leaves or leaves[0][1] is not tensor
        for path in paths:
            if self._selection.excludes(path):
                self._later.append(((path,), tensor, None))
                continue
            if wraps:
                self.wrappers[path] = tensor
            for suffix, leaf, placement in leaves:
                self._put(path + suffix, leaf, placement)

    def _put(self, name: str, tensor: torch.Tensor, placement: Placement | None) -> None:
        if not self._takes_all and not self._selection.takes(name):
            self._left.append((name, tensor))
            return
        known = self.tensors.setdefault(name, tensor)
        if known is not tensor:
            raise UnsupportedTensor(f"{name}: two tensors of the model go by this name; rename or exclude one")
        if placement is not None:
            self.placements[name] = placement

    def _leaves_of(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor, Placement | None]]:
        """The tensors that a tensor is made of, with what each adds to its name: itself, or a subclass's inner ones."""
        kind: type = type(tensor)
        if kind in _PLAIN or not is_traceable_wrapper_subclass_type(kind):
            return [("", tensor, None)]
        found: list[tuple[str, torch.Tensor, Placement | None]] = []
        if _is_dtensor(kind):
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

    def _modules(self, paths: Sequence[str], root: torch.nn.Module) -> None:
        """A module and all registered below it, as `named_parameters` and `named_buffers` would name their tensors."""
        order: list[tuple[str, torch.nn.Module]] = []
        for path in paths:
            self._list_modules(path, root, order, set())
        homes: dict[int, tuple[torch.nn.Module, list[str]]] = {}
        for path, module in order:
            if id(module) in homes:
                homes[id(module)][1].append(path)
            else:
                homes[id(module)] = module, [path]
        tensors: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for kept in ("_parameters", "_buffers"):
            for path, module in order:
                held = module.__dict__.get(kept)
                for key, tensor in list(held.items()) if held else ():
                    if tensor is not None:
                        name = _join(path, key)
                        self.name((name,), tensor)
                        if tensor.__dict__ or type(tensor) not in _PLAIN:
                            tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
        self._seen.update((id(module), module) for module, _ in homes.values())
        for tensor, names in tensors.values():
            self._attributes_of_tensor(names, tensor)
        for module, at in homes.values():
            self._attributes(at, module, _INTERNAL)

    def _list_modules(
        self, path: str, module: torch.nn.Module, order: list[tuple[str, torch.nn.Module]], above: set[int]
    ) -> None:
        if id(module) in self._seen or id(module) in above:
            return
        if self._kind_of(type(module)) == _OPAQUE:
            self.reach((path,), module)
            return
        order.append((path, module))
        if parts := module.__dict__.get("_modules"):
            above.add(id(module))
            for key, part in list(parts.items()):
                if part is not None:
                    self._list_modules(_join(path, key), part, order, above)
            above.remove(id(module))

    def _attributes_of_tensor(self, paths: Sequence[str], tensor: torch.Tensor) -> None:
        if (tensor.__dict__ or type(tensor) not in _PLAIN) and id(tensor) not in self._searched:
            self._searched.add(id(tensor))
            self._attributes(paths, tensor, _LOCAL if _is_dtensor(type(tensor)) else frozenset())

    def _attributes(self, paths: Sequence[str], owner: Any, but: frozenset[str] = frozenset()) -> None:
        """What is in an object's dictionary and slots."""
        dictionary, slots = self._fields_of(type(owner))
        held = _NONE if dictionary is None else dictionary.__get__(owner)
        own = len(held) > len(but) or not but.issuperset(list(held))  # most modules have nothing of their own
        values = list(held.items()) if own else ()  # a list, made at once: a model may be in use
        found = [(k, v) for k, v in values if type(v) not in _SIMPLE and isinstance(k, str) and k not in but]
        for key, slot in slots:
            if key not in but:
                try:
                    found.append((key, slot.__get__(owner)))
                except AttributeError:
                    pass  # it was never set
        for key, value in sorted(found, key=lambda one: one[0]):
            self.reach([_join(path, key) for path in paths], value)

    def _items(self, paths: Sequence[str], mapping: Any) -> None:
        items = mapping.items() if isinstance(mapping, types.MappingProxyType) else dict.items(mapping)
        for i, (key, value) in enumerate(list(items)):
            if type(value) not in _SIMPLE:
                text = _key(key) or f"#{i}"
                self.reach([f"{path}[{text}]" for path in paths], value)

    def _elements(self, paths: Sequence[str], sequence: Any) -> None:
        elements, fields = _elements_of(sequence), getattr(type(sequence), "_fields", ())
        named = isinstance(fields, tuple) and 0 < len(fields) == len(elements)
        for i, value in enumerate(elements):
            if type(value) not in _SIMPLE:
                where = f".{fields[i]}" if named else f"[{i}]"
                self.reach([path + where for path in paths], value)

    def _kind_of(self, kind: type) -> int:
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = self._classify(kind)
        return known

    def _classify(self, kind: type) -> int:
        if kind in _SIMPLE or issubclass(kind, _NEVER):
            return _ATOM
        for base, which in _BASES:
            if issubclass(kind, base):
                return which
        if kind is not types.SimpleNamespace:
            home = str(kind.__module__)
            package = home.partition(".")[0]
            if package in _MACHINERY or (package == "torch" and not home.startswith(_TORCH_DATA)):
                return _ATOM
        dictionary, slots = self._fields_of(kind)
        return _OBJECT if dictionary is not None or slots else _ATOM

    def _fields_of(self, kind: type) -> tuple[Any, list[tuple[str, Any]]]:
        """The descriptors of a class's instance dictionary, if it has one, and of its slots."""
        known = self._fields.get(kind)
        if known is None:
            dictionary, slots = None, []
            for base in kind.__mro__:
                for key, value in vars(base).items():
                    if key == "__dict__" and isinstance(value, _DESCRIPTORS):
                        dictionary = dictionary or value
                    elif isinstance(value, types.MemberDescriptorType):
                        slots.append((key, value))
            known = self._fields[kind] = dictionary, slots
        return known


_BASES: Sequence[tuple[Any, int]] = (
    (torch.Tensor, _TENSOR),
    (torch.jit.ScriptModule, _OPAQUE),
    (torch.nn.Module, _MODULE),
    ((dict, types.MappingProxyType), _MAPPING),
    ((list, tuple, deque), _SEQUENCE),
    ((set, frozenset), _SET),
)


def inner_tensors(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a traceable wrapper subclass is made of, by the names of its attributes.

    Raises `UnsupportedTensor` when it cannot be taken apart.
    """
    try:
        parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {part: getattr(tensor, part) for part in parts}
    except Exception as error:  # the subclass's own code
        raise UnsupportedTensor(f"{name}: this {type(tensor).__name__} cannot be taken apart: {error}") from error
    return {part: one for part, one in inner.items() if isinstance(one, torch.Tensor)}


def _elements_of(collection: Any) -> list[Any]:
    """Those of a list, tuple, deque or set, whatever a subclass makes of them."""
    kinds: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
    kind = next(kind for kind in kinds if isinstance(collection, kind))
    return list(kind.__iter__(collection))


def _is_dtensor(kind: type) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, there are none
    return module is not None and issubclass(kind, module.DTensor)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _key(key: Any) -> str | None:
    """A dict's key as text that is the same in every process; None where it has none."""
    if isinstance(key, enum.Enum):
        return f"{type(key).__name__}.{key.name}"
    if isinstance(key, tuple):
        parts = [_key(part) for part in key]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    return repr(key) if type(key) in _SIMPLE else None
