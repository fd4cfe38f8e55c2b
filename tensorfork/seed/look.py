"""The look at a published model: whether its tensors are where they were when it was published.

It costs what reading the addresses costs, runs on threads of the seed's own, and lets the engine's thread run between
two steps. It does not read the tensors' memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tensorfork.errors import SeedMoved
from tensorfork.memory.allocations import MappedMemory
from tensorfork.model.describe import LocalModel
from tensorfork.regions import Region
from tensorfork.wire.messages import MAX_NAMES

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
        self._extents = [(storage.data_ptr(), storage.nbytes()) for storage in self._storages]
        self._holders = model.holders
        self._layout, self._mapped = model.layout, MappedMemory.of(regions)

    def check(self) -> None:
        """Raise `SeedMoved`, with the names of the tensors, unless all is as it was."""
        if moved := self.moved():
            raise SeedMoved(_describe(moved), tensors=list(moved)[:MAX_NAMES])

    def moved(self) -> Mapping[str, str]:
        """What is not as it was: names of tensors, each with what happened, in words."""
        found: dict[str, str] = {}
        for some in _steps(len(self._tensors)):
            if [tensor.data_ptr() for tensor in self._tensors[some]] != self._addresses[some]:
                found |= self._moved_tensors(some)
        for some in _steps(len(self._storages)):
            extents = self._extents[some]
            now = [(storage.data_ptr(), storage.nbytes()) for storage in self._storages[some]]
            if now != extents:
                for name, (address, nbytes), was in zip(self._storage_names[some], now, extents, strict=True):
                    if address != was[0]:
                        found.setdefault(name, "its storage was freed, or moved to other memory")
                    elif nbytes < was[1]:
                        found.setdefault(name, f"its storage was shrunk to {nbytes:,} bytes")
        for some in _steps(len(self._holders)):
            for name, container, key, value in self._holders[some]:
                if not _holds(container, key, value):
                    found.setdefault(name, "the model holds another object in its place")
        if unmapped := self._mapped.moved():
            names: dict[int, str] = {}
            for tensor in self._layout.tensors:
                names.setdefault(tensor.storage, tensor.name)
            for region, what in unmapped.items():
                found.setdefault(names[region], what)
        return found

    def _moved_tensors(self, some: slice) -> dict[str, str]:
        return {
            name: "it was given other memory, such as by .data or set_()"
            for name, tensor, address in zip(self._names[some], self._tensors[some], self._addresses[some], strict=True)
            if tensor.data_ptr() != address
        }

    def same_as(self, other: "PublishedPlaces") -> bool:
        """Whether both are the same tensors in the same memory, whatever holds them, and nothing was mapped anew."""
        return (
            list(map(id, self._tensors)) == list(map(id, other._tensors))
            and self._addresses == other._addresses
            and self._extents == other._extents
            and not other._mapped.moved()
        )


def _holds(container: Any, key: Any, value: Any) -> bool:
    try:
        if isinstance(container, dict):  # without code that a subclass may have
            return dict.get(container, key) is value
        if isinstance(container, list):
            return list.__getitem__(container, key) is value
        return container[key] is value
    except (LookupError, TypeError):
        return False


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
