"""Models whose weights were put elsewhere: their parameters are empty, and a fork would get nothing."""

import logging
from collections.abc import Mapping

import torch

log = logging.getLogger("tensorfork")

SHARE = 0.1
"""The part of a model's layers that are hollow, from which on that is said.

A layer is hollow if it has an empty parameter, and no tensor of two or more dimensions with elements. Kernels that pack
weights into a handle of their own (oneDNN, as vLLM does on CPUs) leave most layers so. In an ordinary model no layer is
hollow: where a parameter is unused (GPTQ's ``g_idx``), the layer's weight is there beside it.
"""


def hollow_layers(tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], int]:
    """The names of the empty parameters of layers that hold no weights, one each, and how many layers there are."""
    empty: dict[str, str] = {}
    layers: dict[str, bool] = {}
    """Whether each holds weights."""
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        has_elements = tensor.numel() > 0
        layers[layer] = layers.get(layer, False) or (has_elements and tensor.dim() > 1)
        if not has_elements and isinstance(tensor, torch.nn.Parameter):
            empty.setdefault(layer, name)
    return [name for layer, name in empty.items() if not layers[layer]], len(layers)


def warn_if_emptied(tensors: Mapping[str, torch.Tensor]) -> None:
    """Log a warning about a model of which much is empty."""
    hollow, layers = hollow_layers(tensors)
    if len(hollow) > 1 and len(hollow) >= SHARE * layers:
        log.warning(
            "%s of %s layers of the published model have an empty parameter and no weights, such as %s: their weights "
            "may lie in a handle (packed by oneDNN, for example), and forks do not get those. Publish the model before "
            "it is packed, and pack the fork after it was filled",
            f"{len(hollow):,}",
            f"{layers:,}",
            ", ".join(hollow[:3]),
        )
