"""What a fork fills: tensors that are there already, and new ones for those that are still on the meta device.

It is made in two steps. `Room` is memory, which is all that a transport wants to know of, and costs a few milliseconds;
`Target` is the tensors in it, of which there may be many, and can be made while the transport gets ready.

New tensors lie in one allocation for each device, sharing storages as the seed's do. A meta tensor takes its new
memory only in `Target.install`, the last step of a fork, as the same object.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import ref

import torch
from attrs import evolve, field, frozen

from tensorfork.install import Installation, check, like, plain_mode
from tensorfork.layout import ModelLayout, StorageLayout, Survey, TensorLayout
from tensorfork.plan import Pair, union
from tensorfork.spans import ALIGNMENT
from tensorfork.transports.base import Region

Device = str | torch.device | None
_filled: dict[object, ref[Survey]] = {}
"""What forks of this process fill just now. Weak: one that an interrupt leaves in goes with its frame."""
_lock = threading.RLock()
"""From a look at these to an entry. They are taken out without it, as the garbage collector may do that anywhere."""


@frozen
class Room:
    """The memory of what is filled.

    Attributes:
        pairs: our tensors, meta or not, with the seed's that fill them.
        regions: all of it, by storage: new storages are numbered as the seed's are, and ours come behind them.
        gaps: the tensors whose elements have gaps between them, and where they are.
        fresh: what of it is new.
        behind: where ours begin.
        keep: what must stay alive while anything may write.
    """

    pairs: Sequence[Pair]
    regions: Sequence[Region]
    gaps: Sequence[tuple[TensorLayout, torch.device]]
    fresh: "Fresh"
    behind: int
    keep: Sequence[Any]

    @property
    def devices(self) -> set[torch.device]:
        """Where it is."""
        return {torch.device(region.device) for region in self.regions}


def room_for(pairs: Sequence[Pair], theirs: ModelLayout, ours: Survey, device: Device) -> Room:
    """Room for the meta tensors among ours, on `device` (see `place`), beside those that have memory.

    Raises:
        ValueError: the device cannot be used.
        UnsupportedTensor: one of the meta tensors cannot take memory in place.
    """
    meta = [pair.theirs for pair in pairs if ours.tensors[pair.name].is_meta]
    check(dict({id(ours.tensors[one.name]): (one.name, ours.tensors[one.name]) for one in reversed(meta)}.values()))
    fresh = allocate(theirs, sorted({tensor.storage for tensor in meta}), device) if meta else Fresh({}, {}, {})
    behind = len(theirs.storages) if meta else 0
    regions = ours.memory.regions(ours.layout)
    where = [(tensor, fresh.spots[tensor.storage][0]) for tensor in meta]
    where += [(tensor, ours.tensors[tensor.name].device) for tensor in ours.layout.tensors]
    gaps = [(tensor, device) for tensor, device in where if device.type != "meta" and not tensor.is_dense]
    if meta:
        regions = [*fresh.regions, *(evolve(region, id=behind + region.id) for region in regions)]
    return Room(pairs, regions, gaps, fresh, behind, [ours.memory, fresh])


def room_for_all(theirs: ModelLayout, device: Device) -> Room:
    """Room for a whole copy of the seed's tensors. Raises as `room_for` does."""
    fresh = allocate(theirs, sorted({tensor.storage for tensor in theirs.tensors}), device)
    gaps = [(tensor, fresh.spots[tensor.storage][0]) for tensor in theirs.tensors if not tensor.is_dense]
    return Room([Pair(t, t) for t in theirs.tensors], fresh.regions, gaps, fresh, 0, [fresh])


@contextmanager
def alone(ours: Survey) -> Iterator[None]:
    """Round a fork into these tensors: of two at once, each would write over what the other one has verified.

    Raises `ValueError` while another one of this process fills some of them, or of the same bytes.
    """
    mark = object()
    try:
        with _lock:
            others = [other for held in list(_filled.values()) if (other := held()) is not None]
            if any(_meet(ours, other) for other in others):
                raise ValueError("another fork into this model is under way in this process; wait until it has ended")
            _filled[mark] = ref(ours, lambda _: _filled.pop(mark, None))
        if not all(tensor.is_meta for tensor in _metas(ours)):
            raise ValueError("another fork into this model ended while it was looked at; fork again")
        yield
    finally:
        _filled.pop(mark, None)


def _meet(one: Survey, other: Survey) -> bool:
    """Whether the two have meta tensors, or bytes, in common."""
    ids = {id(tensor) for tensor in _metas(one)}
    if any(id(tensor) in ids for tensor in _metas(other)):
        return True
    both = sorted([*_stretches(one), *_stretches(other)])
    return any(before[1] > after[0] for before, after in pairwise(both))


def _metas(ours: Survey) -> list[torch.Tensor]:
    addresses = ours.memory.addresses
    return [ours.tensors[tensor.name] for tensor in ours.layout.tensors if addresses[tensor.storage] is None]


def _stretches(ours: Survey) -> list[tuple[int, int]]:
    """From where to where tensors lie, gaps between their elements included; none of them overlap."""
    addresses = ours.memory.addresses
    starts = ((addresses[tensor.storage], tensor) for tensor in ours.layout.tensors if tensor.numel)
    firsts = ((base + tensor.offset, tensor.extent) for base, tensor in starts if base is not None)
    return union((first, first + extent) for first, extent in firsts)


def _after_fork() -> None:
    """In the child: whoever was filling these is not there."""
    global _lock
    _lock = threading.RLock()
    _filled.clear()


os.register_at_fork(after_in_child=_after_fork)


@frozen
class Target:
    """Where the bytes go.

    Attributes:
        pairs: what fills what; in new storages for meta tensors.
        tensors: the destinations by name, with memory; for meta ones, what they will become.
        installation: how the meta tensors become these.
        wrappers: the tensors of the model that are made of others.
    """

    pairs: Sequence[Pair]
    tensors: Mapping[str, torch.Tensor]
    installation: Installation
    wrappers: Sequence[torch.Tensor]

    def install(self) -> None:
        """Give the meta tensors their memory: all, or (should one refuse) none. The objects stay the same."""
        self.installation.run()

    def touch(self) -> None:
        """Tell autograd that the tensors filled in place are not what they were."""
        replaced = {id(one.new) for one in self.installation.tensors}
        filled = [t for t in self.tensors.values() if id(t) not in replaced and not t.is_inference()]
        filled += [t for t in self.wrappers if not t.is_inference()]
        if filled:
            torch.autograd.graph.increment_version(filled)


def prepare(ours: Survey, room: Room) -> Target:
    """What fills our tensors, those among them that are still meta in the room made for them.

    Raises `UnsupportedTensor` for a tensor made of others that cannot be made anew.
    """
    tensors, wrappers = ours.tensors, list({id(one): one for one in ours.wrappers.values()}.values())
    meta = [pair for pair in room.pairs if tensors[pair.name].is_meta]
    if not meta:
        return Target(room.pairs, tensors, Installation([], []), wrappers)
    ready = dict(tensors)
    made: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    with plain_mode():
        for pair in meta:
            old = tensors[pair.name]
            if id(old) not in made:
                made[id(old)] = pair.name, old, like(old, room.fresh.tensor(pair.theirs, old.stride()))
            ready[pair.name] = made[id(old)][2]
        installation = Installation.prepare({name: (old, new) for name, old, new in made.values()}, ours.wrappers)
    moved = [Pair(pair.theirs, pair.theirs) for pair in meta]
    moved += [
        Pair(pair.theirs, evolve(pair.ours, storage=room.behind + pair.ours.storage))
        for pair in room.pairs
        if not tensors[pair.name].is_meta
    ]
    return Target(moved, ready, installation, wrappers)


def build(room: Room) -> Target:
    """A whole copy of the seed's tensors, in room for all; ties become one tensor under several names."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    tensors = {}
    with plain_mode():
        for tensor in (pair.theirs for pair in room.pairs):
            key = (tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride)
            if key not in made:
                made[key] = room.fresh.tensor(tensor)
            tensors[tensor.name] = made[key]
    return Target(room.pairs, tensors, Installation([], []), [])


@frozen
class Fresh:
    """New storages: stretches of one allocation for each device."""

    buffers: Mapping[torch.device, torch.Tensor]
    spots: Mapping[int, tuple[torch.device, int, int]]
    """By storage: its device, where it begins in the device's buffer, and its bytes."""
    storages: Mapping[torch.device, torch.UntypedStorage]
    _whole: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(factory=dict, init=False)

    @property
    def regions(self) -> list[Region]:
        """One for each storage that has bytes, with the storage's index as its id."""
        bases = {device: (buffer.data_ptr(), str(device)) for device, buffer in self.buffers.items()}
        return [
            Region(storage, bases[device][0] + start, nbytes, bases[device][1], self.storages[device])
            for storage, (device, start, nbytes) in self.spots.items()
            if nbytes
        ]

    def tensor(self, layout: TensorLayout, stride: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor in its storage, with a version counter of its own. To be called in `plain_mode`.

        `stride` is another that reaches the same elements: what an operation chooses may depend on its other values.
        """
        device, start, _ = self.spots[layout.storage]
        dtype = layout.torch_dtype
        whole = self._whole.get((device, dtype))
        if whole is None:
            whole = self._whole[device, dtype] = self.buffers[device].view(dtype)
        offset = (start + layout.offset) // dtype.itemsize
        # A view would count changes together with its base; `data` is none, and costs less than a tensor of its own.
        return whole.as_strided(layout.shape, layout.stride if stride is None else stride, offset).data


def allocate(theirs: ModelLayout, storages: Sequence[int], device: Device) -> Fresh:
    """Room for some of the seed's storages, in one allocation for each device."""
    where = place([theirs.storages[i] for i in storages], device)
    ends: dict[torch.device, int] = {}
    spots = {}
    for i in storages:
        nbytes = theirs.storages[i].nbytes
        on = where(theirs.storages[i])
        start = ends.get(on, 0)
        spots[i] = (on, start, nbytes)
        ends[on] = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
    with torch.inference_mode(False):
        buffers = {on: torch.empty(max(end, ALIGNMENT), dtype=torch.uint8, device=on) for on, end in ends.items()}
    return Fresh(buffers, spots, {on: buffer.untyped_storage() for on, buffer in buffers.items()})


def place(storages: Sequence[StorageLayout], device: Device) -> Callable[[StorageLayout], torch.device]:
    """Where new storages go: to `device`; or, where none is given, to the device of the seed's own name, a seed on one
    GPU to our current one. Raises `ValueError` where this process does not have it.
    """
    wanted = None if device is None else _indexed(torch.device(device))
    if wanted is not None and wanted.type == "meta":
        raise ValueError("device='meta' has no memory to fork into; name a device that has, or none")
    gpus = {storage.device for storage in storages if storage.device.startswith("cuda")}

    def where(storage: StorageLayout) -> torch.device:
        if wanted is not None:
            return wanted
        if storage.device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ValueError(f"the seed's model is on {storage.device} and there is no GPU here; say device='cpu'")
        if len(gpus) == 1:
            return torch.device("cuda", torch.cuda.current_device())
        if torch.device(storage.device).index >= torch.cuda.device_count():
            raise ValueError(f"the seed's model is on {', '.join(sorted(gpus))}, not all of them here; say device=")
        return torch.device(storage.device)

    return where


def given(device: Device) -> set[torch.device]:
    """The device that a caller names, if one is named."""
    return set() if device is None else {_indexed(torch.device(device))}


def _indexed(device: torch.device) -> torch.device:
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
