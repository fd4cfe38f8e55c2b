"""A snapshot: a copy of a model that was described. It stays as it is, whatever becomes of the model.

Ties and shared memory are kept. Clones of the tensors one by one would lose them, and a model that has them could not
be filled from such a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve

from tensorfork.interpreter import ending
from tensorfork.layout import TensorLayout
from tensorfork.model.describe import LocalModel, ModelMemory
from tensorfork.model.modes import NormalMode

_COPY = 256 << 20
"""Bytes that are copied at a time, at most: in between, the process may end."""


def snapshot(model: LocalModel, device: str | torch.device | None = None) -> LocalModel:
    """Copy a model's tensors into new storages, laid out as the model's are.

    It takes as many bytes as the model's storages, each in an allocation of its own, and no more while it is made. The
    copies are made on the current streams and are complete on return. Bytes between the tensors are zero.

    Args:
        model: as `describe` returned it, with no tensor on the meta device.
        device: where the copy goes, such as ``cpu``; by default each storage stays on its device.

    Returns:
        Plain tensors of the same names. The layout differs from the model's in nothing but devices. The values beside
        the tensors are the model's own.
    """
    inside: list[list[TensorLayout]] = [[] for _ in model.layout.storages]
    for tensor in model.layout.tensors:
        inside[tensor.storage].append(tensor)
    with NormalMode():
        buffers = [
            torch.empty(storage.nbytes, dtype=torch.uint8, device=device or storage.device)
            for storage in model.layout.storages
        ]
        for buffer, tensors in zip(buffers, inside, strict=True):
            _fill(buffer, tensors, model)
        copied = _tensors_like(model, buffers)
    for gpu in {tensor.device for tensor in (*model.tensors.values(), *buffers) if tensor.is_cuda}:
        torch.cuda.current_stream(gpu).synchronize()
    storages = tuple(
        evolve(storage, device=str(buffer.device))
        for storage, buffer in zip(model.layout.storages, buffers, strict=True)
    )
    addresses, owners = [one.data_ptr() for one in buffers], [one.untyped_storage() for one in buffers]
    memory = ModelMemory(addresses, owners, model.memory.published)
    return LocalModel(evolve(model.layout, storages=storages), copied, {}, memory, visited=model.visited)


def _fill(buffer: torch.Tensor, tensors: Sequence[TensorLayout], model: LocalModel) -> None:
    """Copy the bytes of all the tensors of one storage, each byte once. The last of these is the storage's last."""
    reached = 0
    for layout in sorted(tensors, key=lambda one: one.offset):
        start, end = max(reached, layout.offset), layout.offset + layout.extent
        if start < end:
            buffer[reached:start].zero_()
            for at in range(start, end, _COPY):
                ending.check()
                part = buffer[at : min(end, at + _COPY)]
                part.copy_(_bytes_of(model.tensors[layout.name], at - layout.offset, part.nbytes))
            reached = end


def _bytes_of(tensor: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    """Bytes of a tensor's storage, counted from its first element, as a tensor that shares them."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    shared = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return shared.set_(tensor.untyped_storage(), first + start, (nbytes,), (1,))


def _tensors_like(model: LocalModel, buffers: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors in other storages. Tied ones are one tensor."""
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    copied = {}
    for layout in model.layout.tensors:
        key = (layout.storage, layout.offset, layout.dtype, layout.shape, layout.stride)
        if key not in made:
            original, buffer = model.tensors[layout.name], buffers[layout.storage]
            tensor = torch.empty(0, dtype=original.dtype, device=buffer.device)
            offset = layout.offset // original.element_size()
            made[key] = tensor.set_(buffer.untyped_storage(), offset, original.shape, original.stride())
        copied[layout.name] = made[key]
    return copied
