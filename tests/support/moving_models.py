"""A model, and what engines and trainers do to its tensors while it is published."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import tensorfork

SIZE = 300
"""Rows and columns: large enough that the C library gives freed memory back to the system."""


class Attention(nn.Module):
    """Weights, one derived from them in an attribute, and more in a list and a dict."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.kv_b = nn.Linear(SIZE, SIZE, bias=False)
        self.out = nn.Linear(SIZE, SIZE, bias=False)
        self.register_buffer("scale", torch.zeros(SIZE, SIZE))
        self.scales = [torch.zeros(SIZE, SIZE)]
        self.tables = {"rope": torch.zeros(SIZE, SIZE)}
        self.fill(value)

    def fill(self, value: float) -> None:
        """Fill every tensor in place, and make the derived one anew, as post-processing does."""
        with torch.no_grad():
            for tensor in (*self.parameters(), self.scale, *self.scales, *self.tables.values()):
                tensor.fill_(value)
        self.derive()

    def derive(self) -> None:
        self.absorbed = self.kv_b.weight.detach().t().contiguous()


def tensors(model: Attention) -> dict[str, torch.Tensor]:
    return {
        "kv_b.weight": model.kv_b.weight,
        "out.weight": model.out.weight,
        "scale": model.scale,
        "scales[0]": model.scales[0],
        "tables['rope']": model.tables["rope"],
        "absorbed": model.absorbed,
    }


def values(model: Attention) -> dict[str, float]:
    """The one value of each tensor. Fails if one has several."""
    found = {name: set(tensor.detach().flatten().tolist()) for name, tensor in tensors(model).items()}
    assert all(len(one) == 1 for one in found.values()), found
    return {name: one.pop() for name, one in found.items()}


def new_parameter(model: Attention) -> None:
    model.kv_b.weight = nn.Parameter(torch.full((SIZE, SIZE), 2.0))


def assigned_state_dict(model: Attention) -> None:
    state = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def rebound_data(model: Attention) -> None:
    model.kv_b.weight.data = torch.full((SIZE, SIZE), 2.0)


def set_to_other_memory(model: Attention) -> None:
    with torch.no_grad():
        model.kv_b.weight.set_(torch.full((SIZE, SIZE), 2.0))


def offloaded(model: Attention) -> None:
    old = model.kv_b.weight.data
    model.kv_b.weight.data = old.clone()
    old.untyped_storage().resize_(0)


def shared_with_processes(model: Attention) -> None:
    model.share_memory()


def new_buffer(model: Attention) -> None:
    model.scale = torch.full((SIZE, SIZE), 2.0)


def new_attribute(model: Attention) -> None:
    model.derive()


def new_element(model: Attention) -> None:
    model.scales[0] = torch.full((SIZE, SIZE), 2.0)


def new_list(model: Attention) -> None:
    model.scales = [torch.full((SIZE, SIZE), 2.0)]


def new_item(model: Attention) -> None:
    model.tables["rope"] = torch.full((SIZE, SIZE), 2.0)


def new_module(model: Attention) -> None:
    model.out = nn.Linear(SIZE, SIZE, bias=False)
    with torch.no_grad():
        model.out.weight.fill_(2.0)


def all_of_it(model: Attention) -> None:
    """A reload: new values in place, and derived attributes anew."""
    model.fill(2.0)


MOVES: dict[str, tuple[Callable[[Attention], None], str]] = {
    "a new parameter": (new_parameter, "kv_b.weight"),
    "load_state_dict(assign=True)": (assigned_state_dict, "kv_b.weight"),
    "a rebound .data": (rebound_data, "kv_b.weight"),
    "set_": (set_to_other_memory, "kv_b.weight"),
    "offloaded": (offloaded, "kv_b.weight"),
    "share_memory": (shared_with_processes, "kv_b.weight"),
    "a new buffer": (new_buffer, "scale"),
    "a derived attribute made anew": (new_attribute, "absorbed"),
    "a new element of a list": (new_element, "scales[0]"),
    "a new list": (new_list, "scales"),
    "a new item of a dict": (new_item, "tables['rope']"),
    "a new module": (new_module, "out"),
    "a reload": (all_of_it, "absorbed"),
}
"""By what is done, the function, and what `SeedMoved` names."""


def freed(model: Attention) -> None:
    """How trainers free weights. The tensors stay, and have no memory."""
    for tensor in tensors(model).values():
        tensor.untyped_storage().resize_(0)


def serve_moving(pipe: Connection, options: dict[str, Any] | None = None) -> None:
    """Publish an `Attention` of ones, send its address, then do what is asked until the pipe is closed.

    ("do", name) a move outside, and ("update", name) inside `updating()`; ("free",) as `freed`; ("rescan",);
    ("suspend", timeout); ("resume",). Each is answered with the text of the error that it raised, or None.
    """
    model = Attention(1.0)
    seed = tensorfork.publish(model, **(options or {}))
    pipe.send(seed.address)
    while True:
        try:
            request, *args = pipe.recv()
        except EOFError:
            break
        said = None
        try:
            if request == "do":
                MOVES[args[0]][0](model)
            elif request == "update":
                with seed.updating():
                    MOVES[args[0]][0](model)
            elif request == "free":
                freed(model)
            elif request == "rescan":
                seed.rescan()
            elif request == "suspend":
                seed.suspend(*args)
            elif request == "resume":
                seed.resume()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        pipe.send(said)
    seed.close()
