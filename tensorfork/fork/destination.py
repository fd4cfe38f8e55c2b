"""What a fork fills: tensors that have memory already, and new ones for those that are still on the meta device.

It is made in two steps. `DestinationMemory` is what a transport needs, and takes milliseconds to make. `Destination`
has the tensors in that memory; there may be many, so they are made while bytes move, where all of the memory is new.

New tensors lie in one allocation for each device, or in one for each storage; `fork.slots` says where, and which share
a storage. A meta tensor takes its new memory only in `Destination.install`, the last step of a fork, and stays the same
object.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, frozen

from tensorfork.fork.new_storages import NewStorages, allocate, device_chooser
from tensorfork.fork.pairs import Pair
from tensorfork.fork.slots import Slots, slots_for, slots_of_copy
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.model.describe import LocalModel
from tensorfork.model.install import Installation, check_installable, like_original
from tensorfork.model.modes import NormalMode
from tensorfork.model.value_writes import ValueWrite
from tensorfork.patience import Check, looking, unchecked
from tensorfork.regions import Region

_META = torch.device("meta")

STEP = 50
"""Tensors made in a row: half a millisecond. Then the thread that moves bytes gets the interpreter if it waits."""


@frozen(eq=False, repr=False)
class DestinationMemory:
    """The memory that a fork writes to.

    Attributes:
        pairs: our tensors, meta or not, with the seed's that fill them.
        filled: the same pairs, with our tensors as they lie in `regions`.
        regions: all of the memory: one region for each new slot, and one for each storage that we had already.
        gapped: the tensors with gaps between their elements, each with its device.
        new: the new storages.
        placed: the layouts of the new tensors, by name, in the new storages.
        tensors_can_wait: whether the tensors may be made while it is being filled: all of it is new, and no wrapper has
            to be put together again, which may fail.
        keep_alive: the owners of the memory.
    """

    pairs: Sequence[Pair]
    filled: Sequence[Pair]
    regions: Sequence[Region]
    gapped: Sequence[tuple[TensorLayout, torch.device]]
    new: NewStorages
    placed: Mapping[str, TensorLayout]
    tensors_can_wait: bool
    keep_alive: Sequence[Any]

    @property
    def devices(self) -> set[torch.device]:
        """The devices that the memory is on."""
        return {torch.device(region.device) for region in self.regions}


def memory_for(
    pairs: Sequence[Pair], theirs: ModelLayout, ours: LocalModel, device: torch.device | None, *, arena: bool = True
) -> DestinationMemory:
    """The memory of our tensors: new storages on `device` (see `device_chooser`) for meta ones, their own for others.

    `arena` is whether new storages lie in one allocation for each device.

    Raises:
        ValueError: the device cannot be used.
        UnsupportedTensor: one of the meta tensors cannot take memory in place.
    """
    meta = [pair for pair in pairs if ours.tensors[pair.name].is_meta]
    by_object = {id(ours.tensors[pair.name]): (pair.name, ours.tensors[pair.name]) for pair in reversed(meta)}
    check_installable(dict(by_object.values()), ours.model)
    device_of = _device_of(theirs, sorted({pair.theirs.storage for pair in meta}), device)
    slots = slots_for(meta, theirs, device_of, apart=not arena)
    new = allocate(slots.slots, arena=arena)
    own_id_offset = max(slots.slots, default=-1) + 1
    gapped = _gapped(slots)
    gapped += [(t, on) for t in ours.layout.tensors if not t.is_dense and (on := ours.tensors[t.name].device) != _META]
    regions, filled = ours.memory.regions(ours.layout), pairs
    if meta:
        regions = [*new.regions, *(evolve(region, id=own_id_offset + region.id) for region in regions)]
        filled = [Pair(pair.theirs, slots.tensors[pair.name]) for pair in meta]
        filled += [
            Pair(pair.theirs, evolve(pair.ours, storage=own_id_offset + pair.ours.storage))
            for pair in (pairs if len(meta) < len(pairs) else ())
            if not ours.tensors[pair.name].is_meta
        ]
    can_wait = len(meta) == len(pairs) and not ours.wrappers
    return DestinationMemory(pairs, filled, regions, gapped, new, slots.tensors, can_wait, [ours.memory, new])


def memory_for_all(theirs: ModelLayout, device: torch.device | None, *, arena: bool = True) -> DestinationMemory:
    """Memory for a whole copy of the seed's tensors, sharing storages as the seed's do. Raises as `memory_for` does."""
    slots = slots_of_copy(theirs, _device_of(theirs, sorted({tensor.storage for tensor in theirs.tensors}), device))
    new = allocate(slots.slots, arena=arena)
    pairs = [Pair(tensor, tensor) for tensor in theirs.tensors]
    return DestinationMemory(pairs, pairs, new.regions, _gapped(slots), new, slots.tensors, True, [new])


def _device_of(
    theirs: ModelLayout, storages: Sequence[int], device: torch.device | None
) -> Callable[[int], torch.device]:
    """A function that gives the device for what is filled from each of these storages of the seed's."""
    devices: dict[int, torch.device] = {}
    if storages:
        choose = device_chooser([theirs.storages[i] for i in storages], device)
        devices = {i: choose(theirs.storages[i]) for i in storages}
    return devices.__getitem__


def _gapped(slots: Slots) -> list[tuple[TensorLayout, torch.device]]:
    return [(one, slots.slots[one.storage].device) for one in slots.tensors.values() if not one.is_dense]


@frozen(eq=False, repr=False)
class Destination:
    """The tensors that a fork fills.

    Attributes:
        tensors: the tensors to fill, by name. For a meta tensor it is a new one, which `install` turns it into.
        installation: the pending change of the meta tensors.
        wrappers: the model's tensors of subclasses that are made of other tensors.
    """

    tensors: Mapping[str, torch.Tensor]
    installation: Installation
    wrappers: Sequence[torch.Tensor]

    def install(self, values: Sequence[ValueWrite] = ()) -> None:
        """Give the meta tensors their new memory, and write these values: all, or none if one fails.

        The tensors stay the same objects.
        """
        self.installation.run(values)

    def mark_changed(self) -> None:
        """Increment the version counters of the tensors that are filled in place, for autograd."""
        replaced = {id(swap.new) for swap in self.installation.tensors}
        filled = [t for t in self.tensors.values() if id(t) not in replaced and not t.is_inference()]
        filled += [t for t in self.wrappers if not t.is_inference()]
        if filled:
            torch.autograd.graph.increment_version(filled)


def tensors_of_model(ours: LocalModel, memory: DestinationMemory, check: Check = unchecked) -> Destination:
    """Our tensors, with a new tensor in the new storages for each that is still meta.

    Raises `UnsupportedTensor` for a wrapper that cannot be rebuilt around new inner tensors.
    """
    tensors, wrappers = ours.tensors, list({id(one): one for one in ours.wrappers.values()}.values())
    meta = [pair for pair in memory.pairs if tensors[pair.name].is_meta]
    if not meta:
        return Destination(tensors, Installation([], []), wrappers)
    ready = dict(tensors)
    made: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    with NormalMode():
        for number, pair in enumerate(looking(meta, check), 1):
            if number % STEP == 0:
                time.sleep(0)
            old = tensors[pair.name]
            if id(old) not in made:
                # strides that matter become the seed's; those that do not stay as they are
                stride = old.stride() if pair.ours.stride == pair.theirs.stride else None
                new = memory.new.tensor(memory.placed[pair.name], stride)
                made[id(old)] = pair.name, old, like_original(old, new)
            ready[pair.name] = made[id(old)][2]
        installation = Installation.prepare({name: (old, new) for name, old, new in made.values()}, ours.wrappers)
    return Destination(ready, installation, wrappers)


def tensors_of_copy(memory: DestinationMemory, check: Check = unchecked) -> Destination:
    """A copy of all the seed's tensors. Tied tensors become one tensor under several names."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    tensors = {}
    with NormalMode():
        for number, tensor in enumerate((pair.theirs for pair in looking(memory.pairs, check)), 1):
            if number % STEP == 0:
                time.sleep(0)
            key = (tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride)
            if key not in made:
                made[key] = memory.new.tensor(tensor)
            tensors[tensor.name] = made[key]
    return Destination(tensors, Installation([], []), [])
