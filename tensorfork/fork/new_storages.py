"""New storages for meta tensors and whole copies: one allocation for each device."""

from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import field, frozen

from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.model.storages import ALIGNMENT
from tensorfork.regions import Region

Device = str | torch.device | None


@frozen
class NewStorages:
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
        """A tensor in its storage, with a version counter of its own. To be called in `normal_mode`.

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


def allocate(theirs: ModelLayout, storages: Sequence[int], device: Device) -> NewStorages:
    """Room for some of the seed's storages, in one allocation for each device."""
    where = device_chooser([theirs.storages[i] for i in storages], device)
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
    return NewStorages(buffers, spots, {on: buffer.untyped_storage() for on, buffer in buffers.items()})


def device_chooser(storages: Sequence[StorageLayout], device: Device) -> Callable[[StorageLayout], torch.device]:
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


def named_device(device: Device) -> set[torch.device]:
    """The device that a caller names, if one is named."""
    return set() if device is None else {_indexed(torch.device(device))}


def _indexed(device: torch.device) -> torch.device:
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
