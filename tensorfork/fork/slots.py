"""Where new tensors lie: which of them share a storage, how large it is, and at which offset each begins. Pure.

New tensors for a model share storages as *its* meta tensors do, whatever the seed's share: two that are objects of
their own get memory of their own, although they are one tensor in the seed. A whole copy has no model to follow, and
shares as the seed does.

What is copied together should lie together. So our storages that come from one of the seed's lie in one slot, in the
seed's order and with the seed's distances, as far as they do not overlap: neighbours there are neighbours here, and are
fetched by one copy. A model whose tensors lie as the seed's do gets the seed's storages exactly.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import torch
from attrs import frozen

from tensorfork.fork.pairs import Pair
from tensorfork.layout import ModelLayout, TensorLayout
from tensorfork.model.storages import ALIGNMENT


class Slot(NamedTuple):
    """Room for one storage, or for several that are filled from one of the seed's: its device, and its bytes."""

    device: torch.device
    nbytes: int


@frozen(eq=False, repr=False)
class Slots:
    """What to allocate, and where in it the new tensors lie.

    Attributes:
        slots: by id. A slot that is filled from one of the seed's storages has that storage's index as its id.
        tensors: the layouts of the new tensors by name; `storage` is the id of a slot.
    """

    slots: Mapping[int, Slot]
    tensors: Mapping[str, TensorLayout]


_Unit = tuple[int, int, Sequence[Pair]]
"""One of our storages, as far as it is filled from one of the seed's: its start and end there, and its tensors."""


def slots_of_copy(theirs: ModelLayout, device_of: Callable[[int], torch.device]) -> Slots:
    """The slots of a whole copy: the seed's storages. `device_of` gives the device for each, by its index."""
    storages = sorted({tensor.storage for tensor in theirs.tensors})
    slots = {storage: Slot(device_of(storage), theirs.storages[storage].nbytes) for storage in storages}
    return Slots(slots, {tensor.name: tensor for tensor in theirs.tensors})


def slots_for(
    pairs: Sequence[Pair], theirs: ModelLayout, device_of: Callable[[int], torch.device], *, apart: bool
) -> Slots:
    """The slots for our meta tensors.

    Args:
        pairs: our meta tensors and the seed's, as `match` paired them.
        theirs: the seed's layout.
        device_of: the device for what comes from each of the seed's storages, by its index.
        apart: each of our storages gets a slot of its own.
    """
    by_source, mixed, empty = _units(pairs, theirs, device_of)
    slots: dict[int, Slot] = {}
    tensors: dict[str, TensorLayout] = {}
    further = count(len(theirs.storages))
    for source in sorted(by_source):
        units = by_source[source]
        start, end, inside = units[0]
        if len(units) == len(inside) == 1 and start < ALIGNMENT and not apart:  # as in most models
            slots[source] = Slot(device_of(source), end)
            tensors[inside[0].name] = inside[0].theirs
            continue
        units.sort(key=itemgetter(0))
        for together in [[unit] for unit in units] if apart else [units]:
            slot = source if source not in slots else next(further)
            slots[slot] = Slot(device_of(source), _place(together, slot, tensors, apart=apart))
    for device, inside in mixed:
        slot = next(further)
        slots[slot] = Slot(device, _place_as_ours(inside, slot, tensors))
    for pair in empty:
        slots.setdefault(pair.theirs.storage, Slot(device_of(pair.theirs.storage), 0))
        tensors[pair.name] = pair.theirs
    return Slots(slots, tensors)


def _units(
    pairs: Sequence[Pair], theirs: ModelLayout, device_of: Callable[[int], torch.device]
) -> tuple[dict[int, list[_Unit]], list[tuple[torch.device, list[Pair]]], list[Pair]]:
    """The tensors that share memory here.

    Returns:
        Units, by the seed's storage that fills them.
        Those that several of these fill, or one in another order, once for each device that they are to be on.
        Tensors without elements, which share with nobody.
    """
    by_storage: dict[int, list[Pair]] = {}
    empty = []
    for pair in pairs:
        if pair.ours.numel:
            by_storage.setdefault(pair.ours.storage, []).append(pair)
        else:
            empty.append(pair)
    by_source: dict[int, list[_Unit]] = {}
    mixed: dict[tuple[int, torch.device], list[Pair]] = defaultdict(list)
    for storage, inside in by_storage.items():
        source = inside[0].theirs.storage
        if len(inside) == 1:
            one = inside[0].theirs
            end = one.offset + one.nbytes
            if end != theirs.storages[source].nbytes:  # else the storage's end is the tensor's, and `extent` costs more
                end = one.offset + one.extent
            by_source.setdefault(source, []).append((one.offset, end, inside))
        elif len({(one.theirs.storage, one.theirs.offset - one.ours.offset) for one in inside}) == 1:
            start = min(one.theirs.offset for one in inside)
            end = max(one.theirs.offset + one.theirs.extent for one in inside)
            by_source.setdefault(source, []).append((start, end, inside))
        else:
            for pair in inside:
                mixed[storage, device_of(pair.theirs.storage)].append(pair)
    return by_source, [(device, inside) for (_, device), inside in mixed.items()], empty


def _place(units: Sequence[_Unit], slot: int, tensors: dict[str, TensorLayout], *, apart: bool) -> int:
    """Place units of one of the seed's storages, sorted, in a slot; return the slot's bytes.

    Each begins as soon after the one before as it can at the seed's offset modulo `ALIGNMENT`, so that it is as well
    aligned as in the seed. What touches there touches here; overlaps and long gaps are gone.
    """
    at = 0
    for start, end, pairs in units:
        at += (start - at) % ALIGNMENT
        if apart and len(pairs) == 1:
            at = 0  # an allocation of its own is aligned better than any tensor needs
        for pair in pairs:
            tensors[pair.ours.name] = _moved(pair.theirs, slot, pair.theirs.offset - start + at)
        at += end - start
    return at


def _place_as_ours(pairs: Sequence[Pair], slot: int, tensors: dict[str, TensorLayout]) -> int:
    """Place tensors to one another as in our meta storage; return the slot's bytes."""
    start = min(pair.ours.offset for pair in pairs)
    start -= start % ALIGNMENT
    for pair in pairs:
        tensors[pair.name] = _moved(pair.theirs, slot, pair.ours.offset - start)
    return max(pair.ours.offset - start + pair.theirs.extent for pair in pairs)


def _moved(tensor: TensorLayout, slot: int, offset: int) -> TensorLayout:
    if (tensor.storage, tensor.offset) == (slot, offset):
        return tensor
    return TensorLayout(tensor.name, tensor.dtype, tensor.shape, tensor.stride, slot, offset, tensor.placement)
