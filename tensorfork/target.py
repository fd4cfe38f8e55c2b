"""What a fork fills: tensors that are there already, and new ones for those that are still on the meta device.

New tensors lie in one allocation for each device, sharing storages as the seed's do. A meta tensor takes its new
memory only in `Target.install`, the last step of a fork, as the same object.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import evolve, field, frozen

from tensorfork.install import Installation, like, plain_mode
from tensorfork.layout import ModelLayout, StorageLayout, Survey, TensorLayout
from tensorfork.plan import Pair
from tensorfork.spans import ALIGNMENT
from tensorfork.transports.base import Region

Device = str | torch.device | None


@frozen
class Target:
    """Where the bytes go.

    Attributes:
        pairs: what fills what; in new storages for meta tensors.
        tensors: the destinations by name, with memory; for meta ones, what they will become.
        regions: the memory of all destinations, by storage.
        installation: how the meta tensors become these.
        wrappers: the tensors of the model that are made of others.
        keep: what must stay alive while anything may write.
    """

    pairs: Sequence[Pair]
    tensors: Mapping[str, torch.Tensor]
    regions: Sequence[Region]
    installation: Installation
    wrappers: Sequence[torch.Tensor]
    keep: Sequence[Any]

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


def prepare(pairs: Sequence[Pair], theirs: ModelLayout, ours: Survey, device: Device) -> Target:
    """Make room for the meta tensors among ours, on `device` (see `place`), beside those that have memory.

    Raises:
        ValueError: the device cannot be used.
        UnsupportedTensor: one of the meta tensors cannot take memory in place.
    """
    tensors, wrappers = ours.tensors, list({id(one): one for one in ours.wrappers.values()}.values())
    regions = ours.memory.regions(ours.layout)
    meta = [pair for pair in pairs if tensors[pair.name].is_meta]
    if not meta:
        return Target(pairs, tensors, regions, Installation([], []), wrappers, [ours.memory])
    fresh = allocate(theirs, sorted({pair.theirs.storage for pair in meta}), device)
    ready = dict(tensors)
    made: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    with plain_mode():
        for pair in meta:
            old = tensors[pair.name]
            if id(old) not in made:
                made[id(old)] = pair.name, old, like(old, fresh.tensor(pair.theirs, old.stride()))
            ready[pair.name] = made[id(old)][2]
        installation = Installation.prepare({name: (old, new) for name, old, new in made.values()}, ours.wrappers)
    # New storages are numbered as the seed's are, and ours that have memory come behind them.
    behind = len(theirs.storages)
    moved = [Pair(pair.theirs, pair.theirs) for pair in meta]
    moved += [
        Pair(pair.theirs, evolve(pair.ours, storage=behind + pair.ours.storage))
        for pair in pairs
        if not tensors[pair.name].is_meta
    ]
    regions = [evolve(region, id=behind + region.id) for region in regions]
    return Target(moved, ready, [*fresh.regions, *regions], installation, wrappers, [ours.memory, fresh])


def build(theirs: ModelLayout, device: Device) -> Target:
    """Make room for a whole copy of the seed's tensors; ties become one tensor under several names."""
    fresh = allocate(theirs, sorted({tensor.storage for tensor in theirs.tensors}), device)
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    tensors = {}
    with plain_mode():
        for tensor in theirs.tensors:
            key = (tensor.storage, tensor.offset, tensor.dtype, tensor.shape, tensor.stride)
            if key not in made:
                made[key] = fresh.tensor(tensor)
            tensors[tensor.name] = made[key]
    return Target([Pair(t, t) for t in theirs.tensors], tensors, fresh.regions, Installation([], []), [], [fresh])


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
