"""What tests of whole forks share: models on the meta device, and what must not change of tensors filled in place."""

from collections.abc import Callable
from typing import Any

import torch
from models import tensors_of
from torch import nn


def identities(model: Any) -> dict[str, Any]:
    """What must not change of tensors that are filled in place."""
    return {
        name: (id(t), t.data_ptr(), t.untyped_storage().data_ptr(), t.requires_grad, id(t.grad), t.stride(), type(t))
        for name, t in tensors_of(model).items()
    }


def to_meta(model: Any) -> Any:
    """The same model without memory, sharing as the model does."""
    storages: dict[int, torch.UntypedStorage] = {}
    done: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            storage = tensor.untyped_storage()
            base = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
            base = storages.setdefault(storage.data_ptr(), base) if tensor.numel() else base
            made = torch.empty(0, dtype=tensor.dtype, device="meta")
            made.set_(base, tensor.storage_offset() if tensor.numel() else 0, tensor.shape, tensor.stride())
            parameter = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if parameter else made
        return done[id(tensor)]

    if isinstance(model, dict):
        return {name: convert(tensor) for name, tensor in model.items()}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: convert(tensor) for name, tensor in held.items() if tensor is not None})
    return model


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()
