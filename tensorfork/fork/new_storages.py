"""New storages for meta tensors and whole copies: one allocation for each device."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from attrs import field, frozen

from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.model.storages import ALIGNMENT
from tensorfork.regions import Region

Device = str | torch.device | None


class Slot(NamedTuple):
    """Where a new storage lies: the offset and the bytes in its device's buffer."""

    device: torch.device
    offset: int
    nbytes: int


@frozen(eq=False, repr=False)
class NewStorages:
    """New storages, in one allocation for each device.

    Attributes:
        buffers: the allocations.
        slots: where each storage lies, by its index in the seed's layout.
        storages: torch's storage of each buffer, which keeps it alive.
    """

    buffers: Mapping[torch.device, torch.Tensor]
    slots: Mapping[int, Slot]
    storages: Mapping[torch.device, torch.UntypedStorage]
    _typed_buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(factory=dict, init=False)

    @property
    def regions(self) -> list[Region]:
        """One for each storage that has bytes, with the storage's index as its id."""
        bases = {device: (buffer.data_ptr(), str(device)) for device, buffer in self.buffers.items()}
        return [
            Region(storage, bases[device][0] + offset, nbytes, bases[device][1], self.storages[device])
            for storage, (device, offset, nbytes) in self.slots.items()
            if nbytes
        ]

    def tensor(self, layout: TensorLayout, stride: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor in its storage, with a version counter of its own. Call it inside `normal_mode`.

        `stride` replaces the layout's by one that reaches the same elements: the strides of dimensions of size 1 may
        differ, and operations choose their memory format by them.
        """
        device, start, _ = self.slots[layout.storage]
        dtype = layout.torch_dtype
        buffer = self._typed_buffers.get((device, dtype))
        if buffer is None:
            buffer = self._typed_buffers[device, dtype] = self.buffers[device].view(dtype)
        offset = (start + layout.offset) // dtype.itemsize
        # A view would share its base's version counter. `.data` does not, and costs less than making a new tensor.
        return buffer.as_strided(layout.shape, layout.stride if stride is None else stride, offset).data


def allocate(theirs: ModelLayout, storages: Sequence[int], device: Device) -> NewStorages:
    """Allocate some of the seed's storages, given by index. Raises as `device_chooser` does."""
    choose = device_chooser([theirs.storages[i] for i in storages], device)
    ends: dict[torch.device, int] = {}
    slots = {}
    for i in storages:
        nbytes = theirs.storages[i].nbytes
        on = choose(theirs.storages[i])
        start = ends.get(on, 0)
        slots[i] = Slot(on, start, nbytes)
        ends[on] = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
    with torch.inference_mode(False):
        buffers = {on: torch.empty(max(end, ALIGNMENT), dtype=torch.uint8, device=on) for on, end in ends.items()}
    return NewStorages(buffers, slots, {on: buffer.untyped_storage() for on, buffer in buffers.items()})


def device_chooser(storages: Sequence[StorageLayout], device: Device) -> Callable[[StorageLayout], torch.device]:
    """A function that gives the device for each new storage.

    That is `device`, if one is given. Else it is the device of the same name as the seed's; but storages of a seed on a
    single GPU go to our current GPU. Both raise `ValueError` for a device that this process cannot use.
    """
    wanted = None if device is None else _indexed(torch.device(device))
    if wanted is not None and wanted.type == "meta":
        raise ValueError("device='meta' has no memory to fork into; name a device that has, or none")
    gpus = {storage.device for storage in storages if storage.device.startswith("cuda")}

    def choose(storage: StorageLayout) -> torch.device:
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

    return choose


def named_device(device: Device) -> set[torch.device]:
    """The device that the caller named, as a set: empty if none."""
    return set() if device is None else {_indexed(torch.device(device))}


def _indexed(device: torch.device) -> torch.device:
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
