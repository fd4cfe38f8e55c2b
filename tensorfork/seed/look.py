"""The look at a published model: whether its tensors are where they were when it was published.

It costs what reading the addresses costs, runs on threads of the seed's own, and lets the engine's thread run between
two steps. It does not read the tensors' memory. Of memory that maps a file, the file's size is asked for.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import compress, islice
from operator import attrgetter, is_, is_not, not_
from typing import Any

import torch

from tensorfork.errors import SeedMoved
from tensorfork.memory.allocations import MappedMemory
from tensorfork.memory.mapped_files import MappedFiles
from tensorfork.model.describe import LocalModel
from tensorfork.model.walk import Holder
from tensorfork.regions import Region
from tensorfork.wire.messages import MAX_NAMES

_REPLACED = "the model holds another object in its place"

LONG = 16
"""Entries of a dict, such as a list of modules, from which on all of its values are compared, and not key by key."""

STEP = 1000
"""Objects looked at in a row: half a millisecond, in which the interpreter is not given away."""


class PublishedPlaces:
    """Where a model's tensors lay when it was published, and what held them.

    Args:
        model: as it was described.
        regions: of its memory; the driver is asked about those on GPUs.
    """

    def __init__(self, model: LocalModel, regions: Sequence[Region]) -> None:
        first_names = {id(tensor): name for name, tensor in reversed(list(model.tensors.items())) if tensor.numel()}
        by_id = {id(tensor): tensor for tensor in model.tensors.values()}
        self._names = list(first_names.values())
        self._tensors = list(map(by_id.__getitem__, first_names))
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        self._kinds = [_kinds(self._tensors[some]) for some in _slices(len(self._tensors))]
        self._forms = _forms(self._tensors)
        storages = list(map(torch.Tensor.untyped_storage, self._tensors))
        keys = [storage._cdata for storage in storages]
        self._storage_names = list(dict(zip(keys, self._names, strict=True)).values())
        self._storages = list(dict(zip(keys, storages, strict=True)).values())
        self._sizes = list(map(torch.UntypedStorage.nbytes, self._storages))
        self._layout, self._mapped = model.layout, MappedMemory.of(regions)
        self._files = MappedFiles.of(model.mapped_spans())
        self._hold(model.holders)

    def with_holders(self, holders: Sequence[Holder]) -> "PublishedPlaces":
        """The same places, of tensors that others hold now."""
        changed = copy(self)
        changed._hold(holders)
        return changed

    def _hold(self, holders: Sequence[Holder]) -> None:
        by_dict: dict[int, list[Holder]] = defaultdict(list)
        for one in holders:
            if isinstance(one[1], dict):
                by_dict[id(one[1])].append(one)
        elsewhere = [one for one in holders if not isinstance(one[1], dict)]
        long = [some for some in by_dict.values() if len(some) >= LONG]
        short = [one for some in by_dict.values() if len(some) < LONG for one in some]
        self._held = (dict.get, _columns(short)), (_item, _columns(elsewhere))
        self._long = [(some[0][1], list(dict.values(some[0][1])), _columns(some)) for some in long]

    def check(self) -> None:
        """Raise `SeedMoved`, with the names of the tensors, unless all is as it was."""
        self._raise({**self.moved(), **self._replaced()})

    def check_memory(self) -> None:
        """The same, of the memory alone: for what was begun when the model held these tensors."""
        self._raise(self.moved())

    @staticmethod
    def _raise(moved: Mapping[str, str]) -> None:
        if moved:
            raise SeedMoved(_describe(moved), tensors=list(moved)[:MAX_NAMES])

    def moved(self) -> dict[str, str]:
        """The tensors that are not where or what they were, by name, each with what happened, in words."""
        found: dict[str, str] = {}
        with torch._C.DisableTorchFunctionSubclass():  # no code of a subclass's is run
            for some, kinds in zip(_steps(len(self._tensors)), self._kinds, strict=True):
                tensors = self._tensors[some]
                if list(map(torch.Tensor.data_ptr, tensors)) != self._addresses[some] or _kinds(tensors) != kinds:
                    found |= self._moved_tensors(some)
            for some in _steps(len(self._storages)):
                if list(map(torch.UntypedStorage.nbytes, self._storages[some])) != self._sizes[some]:
                    found = self._shrunk_storages(some) | found
        found = self._files.truncated() | found
        if unmapped := self._mapped.moved():
            first_names = self._layout.first_names()
            for region, what in unmapped.items():
                found.setdefault(first_names[region], what)
        return found

    def _replaced(self) -> dict[str, str]:
        """The names under which the model holds something else than it did."""
        found: dict[str, str] = {}
        held: list[tuple[Callable[[Any, Any], Any], Sequence[Sequence[Any]]]] = list(self._held)
        for container, was, columns in self._long:
            now = list(dict.values(container))
            if len(now) != len(was) or not all(map(is_, now, was)):
                held.append((dict.get, columns))
        for get, (names, containers, keys, values) in held:
            for some in _steps(len(names)):
                now = list(map(get, containers[some], keys[some]))
                if not all(map(is_, now, values[some])):
                    replaced = map(is_not, now, values[some])
                    found |= dict.fromkeys(compress(names[some], replaced), _REPLACED)
        return found

    def same_forms(self) -> bool:
        """Whether the tensors' shapes and strides are what they were. `moved` sees no more of them than their kinds."""
        with torch._C.DisableTorchFunctionSubclass():
            return _forms(self._tensors) == self._forms

    def _moved_tensors(self, some: slice) -> dict[str, str]:
        found = {}
        forms = zip(*self._forms, strict=True)
        places = zip(self._names, self._tensors, self._addresses, forms, strict=True)
        for name, tensor, address, form in islice(places, some.start, some.stop):
            if tensor.data_ptr() != address:
                found[name] = "it has other memory, or none: it was freed, shared, or given another storage"
            elif next(zip(*_forms([tensor]), strict=True)) != form:
                found[name] = "its shape, its strides or its dtype are not what they were"
        return found

    def _shrunk_storages(self, some: slice) -> dict[str, str]:
        columns = self._storage_names[some], self._storages[some], self._sizes[some]
        return {
            name: f"its storage was shrunk to {storage.nbytes():,} bytes"
            for name, storage, size in zip(*columns, strict=True)
            if storage.nbytes() < size
        }


def _kinds(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Their dtypes, whether they are contiguous, and the strides of those that are not.

    A tensor that is viewed as another dtype, or transposed, over the same memory differs in these. A third of the cost
    of all shapes and strides; what they miss, such as [2, 8] that became [4, 4], has the same bytes in the same order.
    """
    contiguous = list(map(torch.Tensor.is_contiguous, tensors))
    strides = [] if all(contiguous) else [one.stride() for one in compress(tensors, map(not_, contiguous))]
    return list(map(_dtype_of, tensors)), contiguous, strides


def _forms(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    """Their shapes, strides and dtypes."""
    shapes, strides = list(map(torch.Tensor.size, tensors)), list(map(torch.Tensor.stride, tensors))
    return shapes, strides, list(map(_dtype_of, tensors))


_dtype_of = attrgetter("dtype")


def _columns(holders: Sequence[Holder]) -> Sequence[Sequence[Any]]:
    """Their names, containers, keys and values."""
    return list(zip(*holders, strict=True)) or [()] * 4


def _item(container: Any, key: Any) -> Any:
    """What a list or another container holds under a key; None where it has none."""
    try:
        return list.__getitem__(container, key) if isinstance(container, list) else container[key]
    except (LookupError, TypeError):
        return None


def _slices(count: int) -> Iterator[slice]:
    """Slices of `STEP` objects."""
    return (slice(start, start + STEP) for start in range(0, count, STEP))


def _steps(count: int) -> Iterator[slice]:
    """The same. Between two the engine's thread may run, which otherwise waits for up to 5 ms."""
    for some in _slices(count):
        if some.start:
            time.sleep(0)
        yield some


def _describe(moved: Mapping[str, str]) -> str:
    shown = "; ".join(f"{name}: {what}" for name, what in list(moved.items())[:10])
    more = f"; and {len(moved) - 10:,} more" if len(moved) > 10 else ""
    return (
        f"{len(moved):,} of the seed's tensors are not where it published them: {shown}{more}. Nothing more is copied. "
        "In the seed's process, make such changes inside seed.updating(), or call seed.rescan() after them; unmap "
        "memory between seed.suspend() and seed.resume(); exclude= what is made anew all the time"
    )
