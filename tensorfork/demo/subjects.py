"""The models that the demo forks: a Hugging Face folder, or a generated one.

A subject is described by values that JSON carries, so that each process makes its own. `load` gives the model with its
weights; `build` gives the same network on the meta device, from the configuration alone; `compute` runs it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import frozen


@frozen
class Outcome:
    """What a model computed.

    Attributes:
        outputs: every tensor that came out, by name.
        inputs: what went in, as a person reads it.
        kind: what that is: sentences, rows of token ids; or, where nothing came out, why.
        shape: of the vectors: how many, and how long.
        similarities: the cosine of the first vector with each; empty where that means nothing.
    """

    outputs: Mapping[str, torch.Tensor]
    inputs: list[str]
    kind: str
    shape: list[int]
    similarities: list[float]


class Subject(Protocol):
    """A model that can be forked."""

    def load(self) -> torch.nn.Module:
        """With its weights."""

    def build(self) -> torch.nn.Module:
        """Without: on the meta device."""

    def compute(self, model: torch.nn.Module) -> Outcome:
        """Run it, on the same inputs each time."""


def make(described: Mapping[str, Any]) -> Subject:
    """The subject that was described: ``{"folder": path}`` or ``{"generated": bytes}``."""
    if "generated" in described:
        from tensorfork.demo.generated import Generated

        return Generated(described["generated"])
    from tensorfork.demo.folder import Folder

    return Folder(Path(described["folder"]), described.get("dtype"))


def tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file has, as safetensors reads it: mapped, with the bytes to come when they are touched."""
    from safetensors.torch import load_file as load

    found: dict[str, torch.Tensor] = load(path)
    return found


def save(named: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    alone = {(tensor.data_ptr(), tensor.shape): name for name, tensor in named.items()}  # a tied one is written once
    save_file({name: named[name] for name in alone.values()}, path)


def similarities(vectors: torch.Tensor) -> list[float]:
    """The cosine of the first vector with each."""
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    found: list[float] = (unit @ unit[0]).tolist()
    return found


def nothing_to_run(why: str) -> Outcome:
    """The outcome where the demo does not know what to put in."""
    return Outcome({}, [], why, [], [])
