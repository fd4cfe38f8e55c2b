"""The description of a model: its tensors, and the storages they lie in, without copying a byte.

The layout that `describe` returns (`ModelLayout`) is what a seed sends to its forks; the addresses, in a `ModelMemory`,
stay in this process.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, field, frozen
from attrs.validators import instance_of, optional

from tensorfork.errors import UnsupportedTensor
from tensorfork.identity import Identity, Rank
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.layout import DTYPE_NAMES, ModelLayout, StorageLayout, TensorLayout, plain_stride
from tensorfork.memory import mapped_files
from tensorfork.memory.allocations import why_unmapped
from tensorfork.model.causes import check_not_offloaded
from tensorfork.model.modes import check_ordinary
from tensorfork.model.selection import Selection
from tensorfork.model.storages import TensorLocation, locate, storage_extents
from tensorfork.model.walk import FoundTensors, Holder, Visited, walk
from tensorfork.placement import Placement
from tensorfork.regions import Region
from tensorfork.runs import MAX_RUNS, runs_of, union
from tensorfork.validators import MAX_TEXT, is_text


@frozen(eq=False, repr=False)
class ModelMemory:
    """The memory of a `ModelLayout` in this process.

    Attributes:
        addresses: of each storage of the layout; None on the meta device.
        storages: torch's objects, which keep the memory alive.
        published: of each storage of the layout, the ranges that its tensors' elements fill; see `Region`. Of a tensor
            in more than `MAX_RUNS` runs, from its first byte to its last.
    """

    addresses: Sequence[int | None]
    storages: Sequence[torch.UntypedStorage]
    published: Sequence[Sequence[tuple[int, int]]]

    def regions(self, layout: ModelLayout, *, stable: bool = False) -> list[Region]:
        """One region for each storage that has bytes and memory, with the storage's index as its id.

        `stable` is for the regions.
        """
        storages = zip(self.addresses, layout.storages, self.published, strict=True)
        return [
            Region(index, address, storage.nbytes, storage.device, self, published, stable)
            for index, (address, storage, published) in enumerate(storages)
            if address is not None and storage.nbytes
        ]


@frozen(eq=False, repr=False)
class LocalModel:
    """A model in this process.

    Attributes:
        layout: its description.
        tensors: its tensors by name, none of them made of others.
        wrappers: the tensors that are made of these, by name, the inner ones first.
        memory: where its storages lie.
        holders: what holds the tensors; see `tensorfork.model.walk`.
        visited: what the walk has walked into; None for a mapping of tensors.
        model: what was described; None for a snapshot.
    """

    layout: ModelLayout
    tensors: Mapping[str, torch.Tensor]
    wrappers: Mapping[str, torch.Tensor]
    memory: ModelMemory
    holders: Sequence[Holder] = ()
    visited: Visited | None = None
    model: Any = None

    def mapped_spans(self) -> dict[str, tuple[int, int]]:
        """Where each tensor on the CPU begins and ends, by name. Empty where none maps a file or is protected."""
        storages = list(zip(self.memory.addresses, self.layout.storages, strict=True))
        ranges = [(start, start + one.nbytes) for start, one in storages if start and one.device == "cpu"]
        if not mapped_files.any_in(sorted(ranges)):
            return {}
        return {
            tensor.name: (base + tensor.offset, base + tensor.offset + tensor.extent)
            for tensor in self.layout.tensors
            if tensor.numel
            and (base := self.memory.addresses[tensor.storage])
            and self.layout.storages[tensor.storage].device == "cpu"
        }


@frozen(eq=False, repr=False)
class ModelSource:
    """A model that can be walked and described whenever it may have changed.

    Attributes:
        model: an `nn.Module`, or a mapping of names to tensors.
        selection: which of its tensors.
        identity: which model it is.
        rank: which part of it.
    """

    model: Any
    selection: Selection
    identity: Identity | None = field(default=None, validator=optional(instance_of(Identity)))
    rank: Rank | None = field(default=None, validator=optional(instance_of(Rank)))

    def walk(self) -> FoundTensors:
        """What the model holds now. Raises as `describe` does."""
        return walk(self.model, self.selection)

    def describe(self, found: FoundTensors | None = None) -> LocalModel:
        """The model as it is now, or as it was found. Raises as `describe` does."""
        with gc_paused():
            described = _describe(self.walk() if found is None else found, self.identity, self.rank)
            check_not_offloaded(self.model, (name for name, tensor in described.tensors.items() if tensor.is_meta))
            return evolve(described, model=self.model)


def describe(
    model: Any, selection: Selection | None = None, identity: Identity | None = None, rank: Rank | None = None
) -> LocalModel:
    """Describe a model, or the tensors selected from it. Copies nothing.

    Raises:
        TypeError: it is not a model.
        UnsupportedTensor: it has a tensor that cannot be described; the message names it.
    """
    return ModelSource(model, selection or Selection(), identity, rank).describe()


def check_mapped(model: LocalModel, *, writing: bool = False) -> None:
    """Raise `UnsupportedTensor` for a tensor whose memory cannot be read now, or with `writing` not be written.

    On a GPU the driver says so, on the CPU the kernel: memory that is read-only, or maps a file that was truncated.
    """
    if unmapped := why_unmapped(model.memory.regions(model.layout)):
        storage, why = next(iter(unmapped.items()))
        raise UnsupportedTensor(
            f"{model.layout.first_names()[storage]}: {why} ({len(unmapped):,} storages in all). Wake the engine, or "
            "give the model its memory back, first"
        )
    if unusable := mapped_files.why_not_usable(model.mapped_spans(), writing=writing):
        name, why = next(iter(unusable.items()))
        raise UnsupportedTensor(f"{name}: {why} ({len(unusable):,} tensors in all)")


def _describe(found: FoundTensors, identity: Identity | None, rank: Rank | None) -> LocalModel:
    check_ordinary(found.tensors)
    _check_names(found.tensors)
    locations = [locate(name, tensor) for name, tensor in found.tensors.items()]
    extents = storage_extents(locations)
    layouts = tuple(
        _tensor_layout(name, tensor, location, found.placements.get(name))
        for (name, tensor), location in zip(found.tensors.items(), locations, strict=True)
    )
    storages = tuple(StorageLayout(extent.end - extent.start, extent.device) for extent in extents.values())
    memory = ModelMemory(
        [extent.address for extent in extents.values()],
        [storage for extent in extents.values() for storage in extent.storages],
        _published(locations, layouts, len(storages)),
    )
    layout = ModelLayout(layouts, storages, tuple(map(_shown, found.left_out)), identity, rank)
    return LocalModel(layout, found.tensors, found.wrappers, memory, found.holders, found.visited)


def _check_names(names: Iterable[str]) -> None:
    """Raise `UnsupportedTensor` for a name that cannot be sent."""
    for name in names:
        if not is_text(name):
            raise UnsupportedTensor(
                f"{name[:80]!r}: a tensor's name must be a text of at most {MAX_TEXT} characters that can be sent, "
                "without half of a surrogate pair. Call it something else, or leave it out with a pattern in exclude="
            )


def _shown(name: str) -> str:
    """The name of a tensor that is left out, in a form that can be sent and printed."""
    return name if is_text(name) else name[:MAX_TEXT].encode("ascii", "backslashreplace").decode()[:MAX_TEXT]


def _published(
    locations: Sequence[TensorLocation], layouts: Sequence[TensorLayout], storages: int
) -> list[list[tuple[int, int]]]:
    """The ranges that the tensors' elements fill, of each storage."""
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(storages)]
    for location, layout in zip(locations, layouts, strict=True):
        start, nbytes = layout.offset, location.end - location.start
        exact = [(0, nbytes)] if location.contiguous or not nbytes else runs_of(layout, MAX_RUNS)
        if len(exact) == 1 or len(exact) > MAX_RUNS:
            if nbytes:
                ranges[layout.storage].append((start, start + nbytes))
        else:
            ranges[layout.storage] += [(start + at, start + at + length) for at, length in exact]
    return [one if len(one) == 1 else union(one) for one in ranges]


def _tensor_layout(
    name: str, tensor: torch.Tensor, location: TensorLocation, placement: Placement | None
) -> TensorLayout:
    extent = location.extent
    shape = tuple(tensor.shape)
    if (location.start - extent.start) % tensor.element_size():
        raise UnsupportedTensor(
            f"{name}: in memory that it shares with other tensors it does not begin at a multiple of its element's "
            "size, and a fork could not allocate it so; publish a copy"
        )
    return TensorLayout(
        name,
        DTYPE_NAMES[tensor.dtype],
        shape,
        plain_stride(shape, tensor.stride()),
        extent.index,
        location.start - extent.start,
        placement,
    )
