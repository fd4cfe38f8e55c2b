"""What is read of a value beside the tensors, decided by its class alone."""

import enum
import functools
import sys
import types
from typing import Any

import torch
from attrs import frozen

from tensorfork.model.kinds import ATOM, PLAIN_VALUES, SCRIPTED, SET, Classifier

PLAIN, OF_BASE, ENUM, NAMED, FUNCTION, METHOD, PARTIAL, ARRAY, SOME_SET, WALKED, NOTHING, OPAQUE = range(12)
"""PLAIN values are compared as they are, OF_BASE as what a base class makes of them, ENUM members and NAMED classes and
functions by name. A FUNCTION, METHOD or PARTIAL has more within. WALKED is what the walk enters. NOTHING is of no
interest; OPAQUE cannot be looked into."""

BASES: tuple[tuple[type, Any], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, complex.__complex__),
    (str, str.__str__),
    (bytes, bytes.__bytes__),
    (bytearray, bytes),
)
"""Classes of plain values, each with what gives the value of a subclass without running code of that."""

_NAMED = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_NOTHING = (types.ModuleType, types.CellType, types.CodeType, property, staticmethod, classmethod)
_HARMLESS = frozenset(("_thread", "threading", "logging", "weakref", "typing", "types", "abc", "inspect", "warnings"))
"""Packages whose objects hold nothing that a model computes with."""
_PRINTED = (range, type(...), torch.layout, torch.memory_format, torch.qscheme)


@frozen
class Named:
    """A class, a function or a member of an enumeration, by its name."""

    text: str


@frozen(eq=False)
class Array:
    """A numpy array as it was: its dtype, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


class ValueClassifier:
    """Classifies values by their class. Remembers each class for as long as it lives itself."""

    def __init__(self) -> None:
        self.classifier = Classifier()
        self._known: dict[type, int] = {}
        numpy = sys.modules.get("numpy")  # where it was never imported, there are no arrays
        self._arrays: tuple[type, ...] = () if numpy is None else (numpy.ndarray, numpy.generic)

    def kind_of(self, cls: type) -> int:
        """One of the constants above."""
        known = self._known.get(cls)
        if known is None:
            known = self._known[cls] = self._classify(cls)
        return known

    def _classify(self, cls: type) -> int:
        if cls in PLAIN_VALUES:
            return PLAIN
        for bases, kind in (
            (enum.Enum, ENUM),
            (_NAMED, NAMED),
            (types.FunctionType, FUNCTION),
            (types.MethodType, METHOD),
            (functools.partial, PARTIAL),
            (tuple(base for base, _ in BASES) + _PRINTED, OF_BASE),
            (self._arrays, ARRAY),
        ):
            if issubclass(cls, bases):
                return kind
        walked = self.classifier.kind_of(cls)
        if walked != ATOM:
            return {SET: SOME_SET, SCRIPTED: NOTHING}.get(walked, WALKED)
        harmless = issubclass(cls, _NOTHING) or str(cls.__module__).partition(".")[0] in _HARMLESS
        return NOTHING if harmless else OPAQUE


def value_of_base(value: Any) -> Any:
    """The plain value of an object whose class is OF_BASE."""
    cls = type(value)
    if issubclass(cls, _PRINTED):
        return Named(repr(value))
    return next(convert(value) for base, convert in BASES if issubclass(cls, base))


def member_name(member: enum.Enum) -> Named:
    """A member of an enumeration, or a combination of flags, by its name."""
    fields = object.__getattribute__(member, "__dict__")
    known = [one for one in (fields.get("_name_"), fields.get("_value_")) if type(one) in (str, int)]
    return Named(f"{class_name(type(member))}.{known[0] if known else '?'}")


def class_name(cls: type) -> str:
    """A class's name within its module: the module may be ``__main__`` in one process and not in the other."""
    name: str = _qualname(cls)
    return name


def name_of(value: Any) -> Named:
    """A class or a function that is NAMED, by its name within its module."""
    return Named(class_name(value) if isinstance(value, type) else value.__qualname__)


def parts_of(value: Any) -> tuple[Named | None, list[tuple[str, Any]]]:
    """The name of a FUNCTION, METHOD or PARTIAL, and what it holds, each with the suffix of its name.

    Of functions only those that are made anew each time, inside of others, hold values of the model's.
    """
    if isinstance(value, functools.partial):
        function, args, keywords = (get(value) for get in _OF_PARTIAL)
        parts = [(".func", function), *((f".args[{i}]", one) for i, one in enumerate(args))]
        return None, parts + [(f".keywords[{key!r}]", one) for key, one in list(keywords.items())]
    if isinstance(value, types.MethodType):
        return None, [(".__func__", value.__func__), (".__self__", value.__self__)]
    name = value.__qualname__
    if "<locals>" not in name and "<lambda>" not in name:
        return Named(name), []
    code = value.__code__
    if name.endswith("<lambda>"):  # many may have one name: what it refers to tells them apart
        constants = [one for one in code.co_consts if type(one) in (bool, int, float)]
        name += f" {' '.join(code.co_names)} {' '.join(map(repr, constants))}"
    parts = []
    for free, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
        try:
            parts.append((f".__closure__.{free}", cell.cell_contents))
        except ValueError:
            pass  # it was never set
    parts += [(f".__defaults__[{i}]", one) for i, one in enumerate(value.__defaults__ or ())]
    parts += [(f".__kwdefaults__[{key!r}]", one) for key, one in list((value.__kwdefaults__ or {}).items())]
    return Named(name.rstrip()), parts


def array_of(value: Any, limit: int) -> Array | None:
    """A numpy array or scalar as it is; None if it has more bytes than `limit`, or holds objects."""
    numpy = sys.modules["numpy"]
    cls = numpy.ndarray if isinstance(value, numpy.ndarray) else numpy.generic
    dtype, nbytes = cls.dtype.__get__(value), cls.nbytes.__get__(value)
    if dtype.hasobject or nbytes > limit:
        return None
    return Array(dtype.str, cls.shape.__get__(value), cls.tobytes(value))


_OF_PARTIAL = [vars(functools.partial)[name].__get__ for name in ("func", "args", "keywords")]
_qualname = type.__dict__["__qualname__"].__get__
