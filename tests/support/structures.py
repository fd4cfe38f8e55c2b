"""Objects of many kinds that hold tensors, and the names that the walk gives these."""

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import attrs
import torch
from torch import nn

from tensorfork.model.selection import Selection
from tensorfork.model.walk import walk


def names(model: Any, **selection: Any) -> list[str]:
    return list(walk(model, Selection(**selection)).tensors)


def module(**attributes: Any) -> nn.Module:
    made = nn.Module()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def one(size: int = 2) -> torch.Tensor:
    return torch.arange(size)


class Plain:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@dataclass
class Scales:
    k: torch.Tensor
    v: torch.Tensor
    count: int = 3
    more: list[torch.Tensor] = field(default_factory=list)


@attrs.define
class Slotted:
    scale: Any
    inner: Any = None


@attrs.frozen
class Frozen:
    scale: torch.Tensor


class ByHand:
    __slots__ = ("__dict__", "_hidden", "never")

    def __init__(self) -> None:
        self._hidden = one()
        self.shown = one()


class Under(ByHand):
    __slots__ = ("own",)

    def __init__(self) -> None:
        super().__init__()
        self.own = one()


class Range(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


class Side(enum.Enum):
    LEFT = 1
    RIGHT = 2
