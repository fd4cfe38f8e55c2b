"""The plain values that a model holds beside its tensors, under names as the walk gives them.

A module may keep a number that was made of a tensor (``k_scale_float``): a fork has the tensor, and the number only if
somebody sees to it. So numbers, texts, names of classes and functions, small collections of these, and small numpy
arrays are read wherever the walk has been, and also from `functools.partial` and from what functions close over.

It is a second pass: the walk only lists the objects that it enters. No code of the model is run.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

from attrs import define, field, frozen

from tensorfork.model import value_kinds as kinds
from tensorfork.model.entries import (
    BUILT_IN_COLLECTIONS,
    DTENSOR_INTERNALS,
    dictionary_of,
    element_suffixes,
    elements_of,
    items_of,
    key_text,
    slots_of,
)
from tensorfork.model.kinds import MAPPING, MODULE, PLAIN_VALUES, SEQUENCE, SET, TENSOR, Classifier, internals_of
from tensorfork.model.value_kinds import Named, ValueClassifier
from tensorfork.model.walk import Visited

MAX_VALUES = 10_000
"""Values of one model that are compared."""
MAX_NAME = 1000
"""Characters of a value's name. Values with longer names are not looked at."""
MAX_OPAQUE = 100
"""Names of objects that cannot be looked into: so many are kept."""
MAX_INSIDE = 1000
"""Functions and other objects that are entered where the walk has not been."""
LONG_SEQUENCE, LONG_MAPPING = 16, 64
"""Plain entries of a collection, beyond which they are one value: a vocabulary would leave no room for others."""
MAX_ENTRIES = 1_000_000
"""Entries of a collection, beyond which it is not looked into: a million take a second."""
MAX_NESTED = 4
"""Depth of collections in a collection that is one value."""
LONG_UNSORTED = 1000
"""Entries of a mapping, beyond which their order counts."""
MAX_ARRAY, MAX_ARRAYS = 64 << 10, 4 << 20
"""Bytes of a numpy array that is compared, and of all of them."""
STEP = 100
"""Objects that are read in a row, in a fraction of a millisecond."""

Place = tuple[Any, Any, bool]
"""Where a value was read: an object, and its attribute (True) or its key or index (False)."""


@frozen(eq=False)
class Collection:
    """The plain entries of a long collection, as (key, value) for a dict. Those of a set have no order."""

    entries: Sequence[Any]
    is_ordered: bool


@define(eq=False, repr=False)
class Values:
    """The plain values of a model.

    Attributes:
        names: of each value; no two are equal.
        values: plain ones, `Named`, `Array` or `Collection`.
        places: where each was read; None where that is no place of its own.
        opaque: names of objects that cannot be looked into, `MAX_OPAQUE` at most.
        beyond: how many values were not looked at, because there are too many or their names are too long.
        sets: those that were read, each with its elements.
        is_outdated: whether an object is held that the walk has not visited: another one was there then.
        is_volatile: whether `contents_of` the visited objects and the sets may stay the same where values change.
    """

    names: list[str] = field(factory=list)
    values: list[Any] = field(factory=list)
    places: list[Place | None] = field(factory=list)
    opaque: list[str] = field(factory=list)
    beyond: int = 0
    sets: list[tuple[Any, list[Any]]] = field(factory=list)
    is_outdated: bool = False
    is_volatile: bool = False


def contents_of(owner: Any, classifier: Classifier) -> list[Any]:
    """What an object holds, in a list whose elements are other objects if it holds others."""
    cls = type(owner)
    fields = classifier.fields_of(cls)
    contents: list[Any] = [one for slot in slots_of(owner, fields) for one in slot] if fields[1] else []
    kind = classifier.kind_of(cls)
    if issubclass(cls, dict):
        contents += dict.keys(owner)
        contents += dict.values(owner)
    elif kind == MAPPING:
        contents += [one for item in items_of(owner) for one in item]
    elif kind in (SEQUENCE, SET):
        contents += elements_of(owner)
    if fields[0] is not None and cls not in BUILT_IN_COLLECTIONS:
        held = fields[0].__get__(owner)
        contents += held
        contents += held.values()
    return contents


def read_values(visited: Visited, pause: Callable[[], object] = lambda: None) -> Values:
    """The plain values in the objects that a walk has visited, in its order. `pause` is called every `STEP` objects."""
    reader = _Reader(visited)
    for i, (path, one) in enumerate(visited.objects):
        reader.enter(path, one)
        if i % STEP == STEP - 1:
            pause()
    reader.enter_inside()
    return reader.found


class _Reader:
    """One reading. It knows what the walk has visited, and enters nothing else but what functions hold."""

    def __init__(self, visited: Visited) -> None:
        self.found = Values()
        self._visited, self._selection, self._selects_all = visited, visited.selection, visited.selection.is_all
        self._taken: set[str] = set()
        self._folded: set[int] = set()
        """The ids of collections that are part of a longer one's value."""
        self._inside: deque[tuple[str, Any]] = deque()
        """Objects that functions hold and the walk has not visited, to be entered."""
        self._ways: dict[type, tuple[int, frozenset[str], Named | None]] = {}
        self._is_inside = False
        self._entered: dict[int, Any] = {}
        self._array_bytes = MAX_ARRAYS
        self._known: set[int] | None = None
        classifier = ValueClassifier()
        self._kind_of, self._walked_as = classifier.kind_of, classifier.classifier.kind_of
        self._fields_of = classifier.classifier.fields_of

    def enter(self, path: str, owner: Any) -> None:
        """Read what an object holds: its entries, its attributes, and the name of its class."""
        if id(owner) in self._folded:
            return
        cls = type(owner)
        kind, skipped, class_name = self._ways.get(cls) or self._way(cls, owner)
        if kind == MAPPING:
            self._enter_mapping(path, owner)
        elif kind == SEQUENCE:
            self._enter_sequence(path, owner)
        if path and class_name is not None:
            self._add(path, class_name, None)
        if cls not in BUILT_IN_COLLECTIONS:
            self._enter_attributes(path, owner, skipped)

    def _way(self, cls: type, owner: Any) -> tuple[int, frozenset[str], Named | None]:
        """How objects of a class are entered: its kind, the attributes that are skipped, and its name."""
        kind = self._walked_as(cls)
        skipped: frozenset[str] = frozenset()
        if kind == MODULE:
            skipped = internals_of(owner) - {"training"}
        elif kind == TENSOR:
            skipped = _TENSOR_INTERNALS
        has_name = kind != TENSOR and cls not in BUILT_IN_COLLECTIONS and cls is not MappingProxyType
        way = self._ways[cls] = kind, skipped, Named(kinds.class_name(cls)) if has_name else None
        return way

    def enter_inside(self) -> None:
        """Enter what functions and the like hold, where the walk has not been."""
        self._is_inside, entered = True, 0
        while self._inside:
            path, owner = self._inside.popleft()
            entered += 1
            if entered > MAX_INSIDE:
                self._add_opaque(path)
            else:
                self.enter(path, owner)

    def _enter_attributes(self, path: str, owner: Any, skipped: frozenset[str]) -> None:
        fields = self._fields_of(type(owner))
        held = dictionary_of(owner, fields)
        entries = list(held.items()) if held else []
        entries += slots_of(owner, fields) if fields[1] else ()
        prefix, add = f"{path}." if path else "", self._add
        for key, value in entries:
            if key in skipped or type(key) is not str:
                continue
            if type(value) in PLAIN_VALUES:
                add(prefix + key, value, (owner, key, True))
            else:
                self._take(prefix + key, value, (owner, key, True))

    def _enter_mapping(self, path: str, mapping: Any) -> None:
        items = items_of(mapping)
        if len(items) > MAX_ENTRIES:
            self._add_opaque(path)
            return
        if len(items) > LONG_MAPPING:
            plain = [(key, value) for key, value in items if self._folds(value)]
            if len(plain) > LONG_MAPPING:
                self._fold(value for _, value in plain)
                texts = [(key_text(key), value) for key, value in plain]
                self._add(f"{path}[*]", Collection(texts, len(texts) > LONG_UNSORTED), None)
                items = [(key, value) for key, value in items if not self._folds(value)]
        for i, (key, value) in enumerate(items):
            self._take(f"{path}[{key_text(key) or f'#{i}'}]", value, (mapping, key, False))

    def _enter_sequence(self, path: str, sequence: Any) -> None:
        elements = elements_of(sequence)
        if len(elements) > MAX_ENTRIES:
            self._add_opaque(path)
            return
        named = element_suffixes(sequence, len(elements))
        indexed = list(enumerate(elements))
        if len(elements) > LONG_SEQUENCE:
            plain = [value for value in elements if self._folds(value)]
            if len(plain) > LONG_SEQUENCE:
                self._fold(plain)
                self._add(f"{path}[*]", Collection(plain, True), None)
                indexed = [(i, value) for i, value in indexed if not self._folds(value)]
        for i, value in indexed:
            self._take(path + (named[i] if named else f"[{i}]"), value, (sequence, i, False))

    def _folds(self, value: Any, depth: int = MAX_NESTED) -> bool:
        """Whether it can be part of a collection's value: it is plain, or a collection of what is."""
        cls = type(value)
        if cls in PLAIN_VALUES:
            return True
        if cls in (list, tuple) and depth:
            return all(self._folds(one, depth - 1) for one in value)
        if cls is dict and depth:
            return all(self._folds(one, depth - 1) for item in list(value.items()) for one in item)
        return self._kind_of(cls) == kinds.ENUM

    def _fold(self, values: Iterable[Any]) -> None:
        for value in values:
            if type(value) in (list, tuple, dict):
                self._folded.add(id(value))
                self._fold(list(value.values()) if type(value) is dict else value)

    def _take(self, name: str, value: Any, place: Place | None) -> None:
        """Add a value that is held under a name, or what is within it."""
        kind = self._kind_of(type(value))
        if kind == kinds.PLAIN:
            self._add(name, value, place)
        elif kind == kinds.WALKED:
            if place is None or self._is_inside:
                self._take_walked(name, value)
            elif not self.found.is_outdated:
                self._check_visited(name, value)
        elif kind == kinds.OF_BASE:
            self.found.is_volatile |= issubclass(type(value), bytearray)
            self._add(name, kinds.value_of_base(value), place)
        elif kind == kinds.ENUM:
            self._add(name, kinds.member_name(value), place)
        elif kind == kinds.NAMED:
            self._add(name, kinds.name_of(value), place)
        elif kind == kinds.OPAQUE:
            self._add_opaque(name)
        elif kind != kinds.NOTHING:
            self._take_compound(name, kind, value)

    def _take_compound(self, name: str, kind: int, value: Any) -> None:
        """What functions hold, sets and arrays."""
        if kind == kinds.SOME_SET:
            elements = elements_of(value)
            if all(map(self._folds, elements)):
                self.found.sets.append((value, elements))
                self._add(name, Collection(elements, False), None)
            else:
                self._add_opaque(name)
        elif kind == kinds.ARRAY:
            self.found.is_volatile = True
            array = kinds.array_of(value, min(MAX_ARRAY, self._array_bytes))
            if array is None:
                self._add_opaque(name)
            else:
                self._array_bytes -= len(array.content)
                self._add(name, array, None)
        else:
            own_name, parts = kinds.parts_of(value)
            if own_name is not None:
                self._add(name, own_name, None)
            if id(value) not in self._entered:  # it may refer to itself
                self.found.is_volatile |= bool(parts)
                self._entered[id(value)] = value
                for suffix, one in parts:
                    self._take(name + suffix, one, None)

    def _take_walked(self, name: str, value: Any) -> None:
        """An object that a function holds: entered if the walk has not been there. Its tensors would not be forked."""
        known = self._visited_ids()
        if id(value) in known:
            return
        known.add(id(value))
        if self._walked_as(type(value)) in (TENSOR, MODULE):
            self._add_opaque(name)
        else:
            self._inside.append((name, value))

    def _check_visited(self, name: str, value: Any) -> None:
        """Note it where the walk has found another object in this place."""
        is_tensor = self._walked_as(type(value)) == TENSOR
        if not is_tensor and id(value) not in self._visited_ids() and not self._selection.excludes(name):
            self.found.is_outdated = True

    def _visited_ids(self) -> set[int]:
        if self._known is None:
            self._known = {id(one) for _, one in self._visited.objects} | set(map(id, self._visited.tensors.values()))
        return self._known

    def _add(self, name: str, value: Any, place: Place | None) -> None:
        if not self._selects_all and not self._selection.selects(name):
            return
        found = self.found
        if len(found.names) >= MAX_VALUES or not (name.isascii() or _is_unicode(name)) or len(name) > MAX_NAME:
            found.beyond += 1
        elif name not in self._taken:
            self._taken.add(name)
            found.names.append(name)
            found.values.append(value)
            found.places.append(place)

    def _add_opaque(self, name: str) -> None:
        if (self._selects_all or self._selection.selects(name)) and len(self.found.opaque) < MAX_OPAQUE:
            self.found.opaque.append(name)


def _is_unicode(name: str) -> bool:
    """Whether it can be sent: a key of a dict may have half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


_TENSOR_INTERNALS = DTENSOR_INTERNALS | {"_is_buffer", "_is_param", "persistent", "requires_grad"}
"""Marks of torch's and accelerate's on parameters and buffers; a tensor that takes their place may have none."""
