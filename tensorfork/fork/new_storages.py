"""Memory for new tensors: one allocation for each device, or one for each slot."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from attrs import field, frozen

from tensorfork.fork.slots import Slot
from tensorfork.layout import StorageLayout, TensorLayout
from tensorfork.model.storages import ALIGNMENT
from tensorfork.regions import Region


class AllocatedSlot(NamedTuple):
    """Where a slot lies: the number of its allocation, and the offset and the bytes in that."""

    buffer: int
    offset: int
    nbytes: int


@frozen(eq=False, repr=False)
class NewStorages:
    """Allocated slots.

    Attributes:
        buffers: the allocations.
        slots: where each slot lies, by its id.
    """

    buffers: Sequence[torch.Tensor]
    slots: Mapping[int, AllocatedSlot]
    _typed_buffers: dict[tuple[int, torch.dtype], torch.Tensor] = field(factory=dict, init=False)

    @property
    def regions(self) -> list[Region]:
        """One for each slot that has bytes, with the same id. The storage that it lies in is kept alive."""
        bases = [(buffer.data_ptr(), str(buffer.device), buffer.untyped_storage()) for buffer in self.buffers]
        regions = []
        for slot, (buffer, offset, nbytes) in self.slots.items():
            if nbytes:
                base, device, storage = bases[buffer]
                regions.append(Region(slot, base + offset, nbytes, device, storage))
        return regions

    def tensor(self, layout: TensorLayout, stride: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor in its slot, with a version counter of its own. Call it inside `NormalMode`.

        `stride` replaces the layout's by one that reaches the same elements: the strides of dimensions of size 1 may
        differ, and operations choose their memory format by them.
        """
        number, start, _ = self.slots[layout.storage]
        dtype = layout.torch_dtype
        buffer = self._typed_buffers.get((number, dtype))
        if buffer is None:
            whole = self.buffers[number]
            buffer = whole[: whole.nbytes - whole.nbytes % dtype.itemsize].view(dtype)
            self._typed_buffers[number, dtype] = buffer
        offset = (start + layout.offset) // dtype.itemsize
        # A view would share its base's version counter. `.data` does not, and costs less than making a new tensor.
        return buffer.as_strided(layout.shape, layout.stride if stride is None else stride, offset).data


def allocate(slots: Mapping[int, Slot], *, arena: bool) -> NewStorages:
    """Allocate slots: in one allocation for each device, in their order; or, without `arena`, each in its own."""
    with torch.inference_mode(False):
        if not arena:
            buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for device, nbytes in slots.values()]
            return NewStorages(
                buffers, {id: AllocatedSlot(i, 0, slot.nbytes) for i, (id, slot) in enumerate(slots.items())}
            )
        ends: dict[torch.device, int] = {}
        numbers: dict[torch.device, int] = {}
        allocated = {}
        for id, (device, nbytes) in slots.items():
            start = ends.get(device, 0)
            allocated[id] = AllocatedSlot(numbers.setdefault(device, len(numbers)), start, nbytes)
            ends[device] = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
        buffers = [torch.empty(max(end, ALIGNMENT), dtype=torch.uint8, device=on) for on, end in ends.items()]
        return NewStorages(buffers, allocated)


def device_chooser(
    storages: Sequence[StorageLayout], wanted: torch.device | None
) -> Callable[[StorageLayout], torch.device]:
    """A function that gives the device for each new storage.

    That is `wanted` (see `usable_device`), if one is given. Else it is the device of the same name as the seed's; but
    storages of a seed on a single GPU go to our current GPU. Raises `ValueError` for a device that is not here.
    """
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
