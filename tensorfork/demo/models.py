"""The models that the demo forks: from a Hugging Face folder, or generated.

A model is described by values that JSON can carry, so that each process makes its own. `load` gives the model with its
weights; `build` gives the same network on the meta device, from the configuration alone; `compute` runs it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import frozen


@frozen
class Computed:
    """What a model computed.

    Attributes:
        outputs: every output tensor, by name.
        inputs: the inputs, in words for a person.
        kind: what the inputs are, such as sentences or rows of token ids; where nothing was run, the reason.
        shape: of the vectors: how many, and how long.
        similarities: the cosine of the first vector with each; empty where nothing was run.
    """

    outputs: Mapping[str, torch.Tensor]
    inputs: list[str]
    kind: str
    shape: list[int]
    similarities: list[float]


class DemoModel(Protocol):
    """A model that the demo can fork."""

    def load(self) -> torch.nn.Module:
        """The model with its weights."""

    def build(self) -> torch.nn.Module:
        """The model without weights: on the meta device."""

    def compute(self, model: torch.nn.Module) -> Computed:
        """Run the model, on the same inputs each time."""


def from_description(description: Mapping[str, Any]) -> DemoModel:
    """The model that is described by ``{"folder": path}`` or ``{"generated": bytes}``."""
    if "generated" in description:
        from tensorfork.demo.generated import GeneratedModel

        return GeneratedModel(description["generated"])
    from tensorfork.demo.hugging_face import HuggingFaceModel

    return HuggingFaceModel(Path(description["folder"]), description.get("dtype"))


def tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. The file is mapped: its bytes are read when they are first accessed."""
    from safetensors.torch import load_file as load

    loaded: dict[str, torch.Tensor] = load(path)
    return loaded


def save(named: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Tied tensors are written once, under the last of their names."""
    from safetensors.torch import save_file

    unique = {(tensor.data_ptr(), tensor.shape): name for name, tensor in named.items()}
    save_file({name: named[name] for name in unique.values()}, path)


def similarities(vectors: torch.Tensor) -> list[float]:
    """The cosine of the first vector with each."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    cosines: list[float] = (unit @ unit[0]).tolist()
    return cosines


def nothing_computed(reason: str) -> Computed:
    """The result where the demo does not know what inputs the model takes."""
    return Computed({}, [], reason, [], [])
