"""The look at a published model: whether its tensors are where they were when it was published.

It costs what reading the addresses costs, runs on threads of the seed's own, and lets the engine's thread run between
two steps. It does not read the tensors' memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import is_, is_not
from typing import Any

import torch

from tensorfork.errors import SeedMoved
from tensorfork.memory.allocations import MappedMemory
from tensorfork.model.describe import LocalModel
from tensorfork.model.walk import Holder
from tensorfork.regions import Region
from tensorfork.wire.messages import MAX_NAMES

_REPLACED = "the model holds another object in its place"

STEP = 1000
"""Objects looked at in a row: half a millisecond, in which the interpreter is not given away."""


class PublishedPlaces:
    """Where a model's tensors lay when it was published, and what held them.

    Args:
        model: as it was described.
        regions: of its memory; the driver is asked about those on GPUs.
    """

    def __init__(self, model: LocalModel, regions: Sequence[Region]) -> None:
        by_id = {id(tensor): (name, tensor) for name, tensor in reversed(list(model.tensors.items())) if tensor.numel()}
        self._names = [name for name, _ in by_id.values()]
        self._tensors = [tensor for _, tensor in by_id.values()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
        for name, tensor in by_id.values():
            storage = tensor.untyped_storage()
            storages.setdefault(storage._cdata, (name, storage))
        self._storages = [storage for _, storage in storages.values()]
        self._storage_names = [name for name, _ in storages.values()]
        self._sizes = [storage.nbytes() for storage in self._storages]
        in_dicts = [one for one in model.holders if isinstance(one[1], dict)]
        elsewhere = [one for one in model.holders if not isinstance(one[1], dict)]
        self._held = (dict.get, _columns(in_dicts)), (_item, _columns(elsewhere))
        self._layout, self._mapped = model.layout, MappedMemory.of(regions)

    def check(self) -> None:
        """Raise `SeedMoved`, with the names of the tensors, unless all is as it was."""
        if moved := self.moved():
            raise SeedMoved(_describe(moved), tensors=list(moved)[:MAX_NAMES])

    def moved(self) -> Mapping[str, str]:
        """What is not as it was: names of tensors, each with what happened, in words."""
        found: dict[str, str] = {}
        for some in _steps(len(self._tensors)):
            if list(map(torch.Tensor.data_ptr, self._tensors[some])) != self._addresses[some]:
                found |= self._moved_tensors(some)
        for some in _steps(len(self._storages)):
            if list(map(torch.UntypedStorage.nbytes, self._storages[some])) != self._sizes[some]:
                found = self._shrunk_storages(some) | found
        for get, (names, containers, keys, values) in self._held:
            for some in _steps(len(names)):
                held = list(map(get, containers[some], keys[some]))
                if not all(map(is_, held, values[some])):
                    replaced = map(is_not, held, values[some])
                    found |= dict.fromkeys(compress(names[some], replaced), _REPLACED)
        if unmapped := self._mapped.moved():
            first_names = self._layout.first_names()
            for region, what in unmapped.items():
                found.setdefault(first_names[region], what)
        return found

    def _moved_tensors(self, some: slice) -> dict[str, str]:
        return {
            name: "it has other memory, or none: it was freed, shared, or given another storage"
            for name, tensor, address in zip(self._names[some], self._tensors[some], self._addresses[some], strict=True)
            if tensor.data_ptr() != address
        }

    def _shrunk_storages(self, some: slice) -> dict[str, str]:
        columns = self._storage_names[some], self._storages[some], self._sizes[some]
        return {
            name: f"its storage was shrunk to {storage.nbytes():,} bytes"
            for name, storage, size in zip(*columns, strict=True)
            if storage.nbytes() < size
        }

    def same_as(self, other: "PublishedPlaces") -> bool:
        """Whether both are the same tensors in the same memory, whatever holds them, and nothing was mapped anew."""
        return (
            list(map(id, self._tensors)) == list(map(id, other._tensors))
            and self._addresses == other._addresses
            and self._sizes == other._sizes
            and not other._mapped.moved()
        )


def _columns(holders: Sequence[Holder]) -> Sequence[Sequence[Any]]:
    """Their names, containers, keys and values."""
    return list(zip(*holders, strict=True)) or [()] * 4


def _item(container: Any, key: Any) -> Any:
    """What a list or another container holds under a key; None where it has none."""
    try:
        return list.__getitem__(container, key) if isinstance(container, list) else container[key]
    except (LookupError, TypeError):
        return None


def _steps(count: int) -> Iterator[slice]:
    """Slices of `STEP` objects. Between two the engine's thread may run, which otherwise waits for up to 5 ms."""
    for start in range(0, count, STEP):
        if start:
            time.sleep(0)
        yield slice(start, start + STEP)


def _describe(moved: Mapping[str, str]) -> str:
    shown = "; ".join(f"{name}: {what}" for name, what in list(moved.items())[:10])
    more = f"; and {len(moved) - 10:,} more" if len(moved) > 10 else ""
    return (
        f"{len(moved):,} of the seed's tensors are not where it published them: {shown}{more}. Nothing more is copied. "
        "In the seed's process, make such changes inside seed.updating(), or call seed.rescan() after them; unmap "
        "memory between seed.suspend() and seed.resume(); exclude= what is made anew all the time"
    )
