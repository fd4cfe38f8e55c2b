"""What the walk does with an object, decided by its class alone."""

import enum
import sys
import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

ATOM, TENSOR, MODULE, MAPPING, SEQUENCE, SET, SCRIPTED, OBJECT = range(8)
"""An atom is not walked into; a scripted module cannot be."""

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
PLAIN_VALUES = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size))

_BASES: Sequence[tuple[Any, int]] = (
    (torch.Tensor, TENSOR),
    (torch.jit.ScriptModule, SCRIPTED),
    (torch.nn.Module, MODULE),
    ((dict, types.MappingProxyType), MAPPING),
    ((list, tuple, deque), SEQUENCE),
    ((set, frozenset), SET),
)
_IGNORED_BASES = (type, enum.Enum, BaseException, types.ModuleType, torch.optim.Optimizer)
# fmt: off
_IGNORED_PACKAGES = frozenset((
    "_thread", "abc", "accelerate", "asyncio", "builtins", "concurrent", "contextlib", "contextvars", "ctypes",
    "functools", "importlib", "inspect", "io", "logging", "multiprocessing", "numpy", "operator", "pathlib", "queue",
    "re", "socket", "subprocess", "threading", "triton", "types", "typing", "unittest", "weakref",
))
# fmt: on
"""Packages whose objects are not part of a model. Not the whole standard library: a module of the caller's with the
name of a lesser known one would be skipped silently."""
_TORCH_DATA = ("torch.nn.", "torch.ao.", "torch.distributions.")
"""The parts of torch whose objects may belong to a model; objects of its other parts never do."""

_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)

Fields = tuple[Any, list[tuple[str, Any]]]
"""The descriptor of a class's instance dictionary (None without one), and its slots: (name, descriptor)."""


class Classifier:
    """Classifies objects by their class. Remembers each class for as long as it lives itself."""

    def __init__(self) -> None:
        self._kinds: dict[type, int] = {}
        self._fields: dict[type, Fields] = {}

    def kind_of(self, cls: type) -> int:
        """One of the constants above."""
        known = self._kinds.get(cls)
        if known is None:
            known = self._kinds[cls] = self._classify(cls)
        return known

    def fields_of(self, cls: type) -> Fields:
        """How to read the attributes of the class's instances without running code of theirs."""
        known = self._fields.get(cls)
        if known is None:
            known = self._fields[cls] = _find_fields(cls)
        return known

    def _classify(self, cls: type) -> int:
        if cls in PLAIN_VALUES or issubclass(cls, _IGNORED_BASES):
            return ATOM
        for base, kind in _BASES:
            if issubclass(cls, base):
                return kind
        if cls is not types.SimpleNamespace and _is_ignored(str(cls.__module__)):
            return ATOM
        dictionary, slots = self.fields_of(cls)
        return OBJECT if dictionary is not None or slots else ATOM


def _is_ignored(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _IGNORED_PACKAGES or (package == "torch" and not module.startswith(_TORCH_DATA))


def _find_fields(cls: type) -> Fields:
    dictionary: Any = None
    slots: list[tuple[str, Any]] = []
    for base in cls.__mro__:
        for key, value in vars(base).items():
            if key == "__dict__" and isinstance(value, _DESCRIPTORS):
                dictionary = dictionary or value
            elif isinstance(value, types.MemberDescriptorType):
                slots.append((key, value))
    return dictionary, slots


def is_dtensor(cls: type) -> bool:
    """Whether it is torch's `DTensor`, or a subclass. Does not import it."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, there are none
    return module is not None and issubclass(cls, module.DTensor)


_MODULE_INTERNALS = frozenset(torch.nn.Module().__dict__)
"""What `nn.Module` itself keeps on an instance: hooks, and the registered tensors and modules, visited separately."""
# fmt: off
_DDP_INTERNALS = _MODULE_INTERNALS | frozenset((
    "_delay_all_reduce_params", "_delay_grad_buffer", "_delay_grad_views", "_module_parameters", "modules_buffers",
    "named_module_buffers",
))
# fmt: on
"""DDP keeps lists of the tensors of the module in it, and of gradients."""


def internals_of(module: torch.nn.Module) -> frozenset[str]:
    """The attributes of a module that are not looked at: torch's own, which hold what is registered, or no weights."""
    return _DDP_INTERNALS if isinstance(module, torch.nn.parallel.DistributedDataParallel) else _MODULE_INTERNALS
