"""Models as wrappers rename them: torch.compile, DDP, DataParallel, FSDP, activation checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


class Model(nn.Module):
    """With a tie, buffers of both kinds, a tensor in a list, and layers that are alike."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(5), persistent=False)
        self.scales = [torch.zeros(2), torch.zeros(3)]
        if not self.table.is_meta:
            self.fill(value)

    def fill(self, value: float) -> None:
        tensors = [*self.parameters(), *self.buffers(), *self.scales]
        with torch.no_grad():
            for i, tensor in enumerate(tensors):
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 100 * i + value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def compiled(model: Model) -> Any:
    return torch.compile(model, backend="eager")


def compiled_layers(model: Model) -> Any:
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    return model


def compiled_twice(model: Model) -> Any:
    return compiled(compiled_layers(model))


def checkpointed_layers(model: Model) -> Any:
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer)
    return model


def data_parallel(model: Model) -> Any:
    return nn.DataParallel(model)


class Outer(nn.Module):
    """An engine's class around another one."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = model


WRAPPERS: dict[str, Callable[[Model], Any]] = {
    "torch.compile": compiled,
    "torch.compile of layers": compiled_layers,
    "torch.compile of both": compiled_twice,
    "checkpoint_wrapper": checkpoint_wrapper,
    "checkpoint_wrapper of layers": checkpointed_layers,
    "DataParallel": data_parallel,
    "another class": Outer,
}


@contextmanager
def one_process_group() -> Iterator[None]:
    """gloo with this process alone, for DDP and FSDP."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
