"""Why tensors of a model are on the meta device, or cannot leave it: who else has a hand in them, and what to do.

Recognised by what they leave on modules; nothing is imported for it.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tensorfork.errors import UnsupportedTensor

_NORMS = {"torch.nn.utils.weight_norm": "weight_norm", "torch.nn.utils.spectral_norm": "spectral_norm"}


def check_not_offloaded(model: Any, meta: Iterable[str]) -> None:
    """Raise `UnsupportedTensor` for a tensor on the meta device, of these names, whose weights accelerate keeps.

    It would put those in the place of a fork's before the next forward pass, and take both away after it.
    """
    if "accelerate" in sys.modules and (offloading := _offloading_modules(model)):
        for name in meta:
            if (module := _owner(name, offloading)) is not None:
                raise UnsupportedTensor(
                    f"{name} is on the meta device because accelerate keeps its weights elsewhere, on the CPU or on "
                    f"disk, and puts them in place for each forward pass (a hook on {module or 'the model'!r}). Load "
                    "the model without offloading, or call accelerate.hooks.remove_hook_from_module(model, "
                    "recurse=True) first, which brings back what it has; or exclude those modules"
                )


def held_by(model: Any, name: str) -> str | None:
    """What holds on to a tensor by way of torch's old norms, in words with the remedy; None if those have no part."""
    modules = dict(_modules(model))
    module = modules.get(name.rpartition(".")[0])
    hooks: Mapping[Any, Any] = {} if module is None else module._forward_pre_hooks
    for hook in hooks.values():
        norm = _NORMS.get(type(hook).__module__)
        attribute = getattr(hook, "name", None)
        if norm and attribute and name.rpartition(".")[2].startswith(attribute):
            return (
                f"torch.nn.utils.{norm} has computed {attribute!r} from it, and autograd keeps the graph of that. "
                "Build the model under torch.no_grad(); or, for both sides, use "
                f"torch.nn.utils.parametrizations.{norm}, or call torch.nn.utils.remove_{norm}"
            )
    return None


def _modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    return model.named_modules(remove_duplicate=False) if isinstance(model, torch.nn.Module) else iter(())


def _offloading_modules(model: Any) -> dict[str, bool]:
    """The names of modules with a hook of accelerate's that offloads; whether it does so for all below them."""
    found: dict[str, bool] = {}
    for name, module in _modules(model):
        if (hook := module.__dict__.get("_hf_hook")) is not None:
            hooks = [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]
            if hooks:
                found[name] = any(getattr(one, "place_submodules", False) for one in hooks)
    return found


def _owner(tensor: str, offloading: Mapping[str, bool]) -> str | None:
    """The module among these that offloads a tensor: the one that holds it, or one above it that does so for all."""
    module = tensor.rpartition(".")[0]
    if module in offloading:
        return module
    above = (one for one, all_below in offloading.items() if all_below and (not one or module.startswith(f"{one}.")))
    return next(above, None)
