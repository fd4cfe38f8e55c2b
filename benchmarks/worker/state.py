"""What a worker keeps between two calls."""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch


class Skip(Exception):
    """This machine cannot measure it; the message says why."""


@dataclass
class WorkerState:
    """The state of one worker.

    Attributes:
        name: the worker's name.
        device: where its tensors are.
        model: what it publishes or fills, once it has built one.
        tensors: the model's tensors by name.
        seed: what `publish` returned.
        resources: objects that one call makes and later ones use, by name: sockets, transports, buffers, engines.
    """

    name: str
    device: str
    model: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    seed: Any = None
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether its tensors are on a GPU."""
        return self.device.startswith("cuda")

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def sync(self) -> None:
        """Wait for the GPU's work to finish; on a CPU, do nothing."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without numpy."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
