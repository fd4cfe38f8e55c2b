"""What a fork fills: tensors that have memory already, and new ones for those that are still on the meta device.

It is made in two steps. `DestinationMemory` is what a transport needs, and takes milliseconds to make. `Destination`
has the tensors in that memory; there may be many, so they are made while the transport opens.

New tensors lie in one allocation for each device, sharing storages as the seed's do. A meta tensor takes its new
memory only in `Destination.install`, the last step of a fork, and stays the same object.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, frozen

from tensorfork.fork.new_storages import Device, NewStorages, allocate
from tensorfork.fork.pairs import Pair
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.model.describe import LocalModel
from tensorfork.model.install import Installation, check_installable, like_original, normal_mode
from tensorfork.regions import Region


@frozen(eq=False, repr=False)
class DestinationMemory:
    """The memory that a fork writes to.

    Attributes:
        pairs: our tensors, meta or not, with the seed's that fill them.
        regions: all of the memory, one region for each storage. A new storage has the seed's number for it as its id.
        gapped: the tensors with gaps between their elements, each with its device.
        new: the new storages.
        own_id_offset: added to the number of a storage that we had already, so that no new storage has the same id.
        keep_alive: the owners of the memory.
    """

    pairs: Sequence[Pair]
    regions: Sequence[Region]
    gapped: Sequence[tuple[TensorLayout, torch.device]]
    new: NewStorages
    own_id_offset: int
    keep_alive: Sequence[Any]

    @property
    def devices(self) -> set[torch.device]:
        """The devices that the memory is on."""
        return {torch.device(region.device) for region in self.regions}


def memory_for(pairs: Sequence[Pair], theirs: ModelLayout, ours: LocalModel, device: Device) -> DestinationMemory:
    """The memory of our tensors: new storages on `device` (see `device_chooser`) for meta ones, their own for others.

    Raises:
        ValueError: the device cannot be used.
        UnsupportedTensor: one of the meta tensors cannot take memory in place.
    """
    meta = [pair.theirs for pair in pairs if ours.tensors[pair.name].is_meta]
    by_object = {id(ours.tensors[one.name]): (one.name, ours.tensors[one.name]) for one in reversed(meta)}
    check_installable(dict(by_object.values()))
    new = allocate(theirs, sorted({tensor.storage for tensor in meta}), device) if meta else NewStorages({}, {}, {})
    own_id_offset = len(theirs.storages) if meta else 0
    regions = ours.memory.regions(ours.layout)
    placed = [(tensor, new.slots[tensor.storage].device) for tensor in meta]
    placed += [(tensor, ours.tensors[tensor.name].device) for tensor in ours.layout.tensors]
    gapped = [(tensor, device) for tensor, device in placed if device.type != "meta" and not tensor.is_dense]
    if meta:
        regions = [*new.regions, *(evolve(region, id=own_id_offset + region.id) for region in regions)]
    return DestinationMemory(pairs, regions, gapped, new, own_id_offset, [ours.memory, new])


def memory_for_all(theirs: ModelLayout, device: Device) -> DestinationMemory:
    """Memory for a whole copy of the seed's tensors. Raises as `memory_for` does."""
    new = allocate(theirs, sorted({tensor.storage for tensor in theirs.tensors}), device)
    gapped = [(tensor, new.slots[tensor.storage].device) for tensor in theirs.tensors if not tensor.is_dense]
    return DestinationMemory([Pair(t, t) for t in theirs.tensors], new.regions, gapped, new, 0, [new])


@frozen(eq=False, repr=False)
class Destination:
    """The tensors that a fork fills.

    Attributes:
        pairs: which of the seed's tensors fills which of ours; for meta tensors, in the new storages.
        tensors: the tensors to fill, by name. For a meta tensor it is a new one, which `install` turns it into.
        installation: the pending change of the meta tensors.
        wrappers: the model's tensors of subclasses that are made of other tensors.
    """

    pairs: Sequence[Pair]
    tensors: Mapping[str, torch.Tensor]
    installation: Installation
    wrappers: Sequence[torch.Tensor]

    @property
    def layouts(self) -> list[TensorLayout]:
        """The layouts of our tensors."""
        return [pair.ours for pair in self.pairs]

    def install(self) -> None:
        """Give the meta tensors their new memory: all of them, or none if one fails. They stay the same objects."""
        self.installation.run()

    def mark_changed(self) -> None:
        """Increment the version counters of the tensors that are filled in place, for autograd."""
        replaced = {id(swap.new) for swap in self.installation.tensors}
        filled = [t for t in self.tensors.values() if id(t) not in replaced and not t.is_inference()]
        filled += [t for t in self.wrappers if not t.is_inference()]
        if filled:
            torch.autograd.graph.increment_version(filled)


def tensors_of_model(ours: LocalModel, memory: DestinationMemory) -> Destination:
    """Our tensors, with a new tensor in the new storages for each that is still meta.

    Raises `UnsupportedTensor` for a wrapper that cannot be rebuilt around new inner tensors.
    """
    tensors, wrappers = ours.tensors, list({id(one): one for one in ours.wrappers.values()}.values())
    meta = [pair for pair in memory.pairs if tensors[pair.name].is_meta]
    if not meta:
        return Destination(memory.pairs, tensors, Installation([], []), wrappers)
    ready = dict(tensors)
    made: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    with normal_mode():
        for pair in meta:
            old = tensors[pair.name]
            if id(old) not in made:
                made[id(old)] = pair.name, old, like_original(old, memory.new.tensor(pair.theirs, old.stride()))
            ready[pair.name] = made[id(old)][2]
        installation = Installation.prepare({name: (old, new) for name, old, new in made.values()}, ours.wrappers)
    renumbered = [Pair(pair.theirs, pair.theirs) for pair in meta]
    renumbered += [
        Pair(pair.theirs, evolve(pair.ours, storage=memory.own_id_offset + pair.ours.storage))
        for pair in memory.pairs
        if not tensors[pair.name].is_meta
    ]
    return Destination(renumbered, ready, installation, wrappers)


def tensors_of_copy(memory: DestinationMemory) -> Destination:
    """A copy of all the seed's tensors. Tied tensors become one tensor under several names."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    tensors = {}
    with normal_mode():
        for tensor in (pair.theirs for pair in memory.pairs):
            key = (tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride)
            if key not in made:
                made[key] = memory.new.tensor(tensor)
            tensors[tensor.name] = made[key]
    return Destination(memory.pairs, tensors, Installation([], []), [])
