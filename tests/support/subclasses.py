"""Tensor subclasses that are made of other tensors."""

from typing import Any

import torch


class Pair(torch.Tensor):
    """A tensor made of two, as quantized ones are."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> "Pair":
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, device=data.device)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_, self.scale, self.note = data, scale, {"bits": 8}

    def __repr__(self, **_: Any) -> str:
        return "Pair"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> "Pair":
        return cls(inner["data_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale)
        plain = [arg.data_ * arg.scale if isinstance(arg, Pair) else arg for arg in args]
        return function(*plain, **(kwargs or {}))
