"""The walk runs no code of the model, keeps out of what is not part of it, and leaves nothing behind."""

import functools
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from structures import Slotted, module, names, one
from torch import nn

from tensorfork.model.walk import walk

# What is not run, and where the walk does not look.


class Trap:
    def __init__(self) -> None:
        self.t = one()

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    def __hash__(self) -> int:
        raise AssertionError("it was hashed")

    def __len__(self) -> int:
        raise AssertionError("it was measured")

    def __repr__(self) -> str:
        raise AssertionError("it was printed")


def test_no_property_is_run() -> None:
    class Careful(nn.Module):
        @property
        def trap(self) -> torch.Tensor:
            raise AssertionError("a property was run")

        @functools.cached_property
        def later(self) -> torch.Tensor:
            raise AssertionError("a cached property was run")

    class Mine(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("its items were asked for")

    class Row(list[Any]):
        _fields = property(lambda self: 3)

        def __iter__(self) -> Any:
            raise AssertionError("its elements were asked for")

    model = Careful()
    model.a, model.b, model.c = Trap(), Mine(k=one()), Row([one()])
    assert names(model) == ["a.t", "b['k']", "c[0]"]


class Momentum(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, momentum=0.9)
        self.mean = one()


def held_elsewhere() -> Iterator[tuple[str, Any]]:
    tensor = one()
    yield "a function that closes over it", lambda: tensor
    yield "a partial function", functools.partial(torch.add, tensor)
    yield "a bound method", tensor.add
    yield "a class", type("Constant", (), {"table": tensor})
    yield "an object of a class that has it", type("Constant", (), {"table": tensor})()
    yield "a weak reference", weakref.ref(tensor)
    yield "a thread", threading.Thread(target=print, args=(tensor,))
    yield "a logger", logging.getLogger("tensorfork")
    yield "a generator", (x for x in [tensor])
    yield "an exception", ValueError(tensor)
    yield "an optimizer", torch.optim.SGD([nn.Parameter(torch.ones(2))], momentum=0.9)
    yield "an optimizer of one's own", Momentum([nn.Parameter(torch.ones(2))])
    yield "a graph", torch.fx.Graph()
    yield "a random generator", torch.Generator()
    yield "a module of Python", torch


@pytest.mark.parametrize(("where", "value"), list(held_elsewhere()), ids=[where for where, _ in held_elsewhere()])
def test_nothing_is_looked_for_in(where: str, value: Any) -> None:
    assert names(module(a=value, b=one())) == ["b"]


def test_gradients_and_hooks_are_no_part_of_a_model() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    held = one()
    model.register_forward_hook(lambda *_: held)
    model._backward_hooks[0] = held
    assert model.weight.grad is not None
    assert names(model) == ["weight", "bias"]


# The walk takes time in proportion to the model, and leaves nothing behind.


def large() -> nn.Module:
    model = nn.Module()
    for i in range(2000):
        layer = module(w_kc=one(), scales=[one(), one()])
        for j in range(5):
            layer.register_parameter(f"p{j}", nn.Parameter(torch.empty(4)))
        for j in range(2):
            layer.register_buffer(f"b{j}", torch.empty(4))
        model.add_module(f"layer{i}", layer)
    return model


def test_a_walk_reads_each_thing_once_however_large_the_model() -> None:
    """Counted, not timed: the calls that a walk makes grow in proportion to the model."""
    import sys

    def steps(model: nn.Module) -> int:
        count = 0

        def see(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            walk(model)
        finally:
            sys.setprofile(None)
        return count

    model = large()
    assert len(walk(model).tensors) == 20_000
    small = nn.Module()
    for i in range(200):
        small.add_module(f"layer{i}", model.get_submodule(f"layer{i}"))
    assert steps(model) < 11 * steps(small)
    assert steps(model) < 21 * 20_000


def test_a_walk_leaves_nothing_on_the_model() -> None:
    model = module(a=Slotted(one()), b=[one()])
    tensor = model.b[0]
    before = len(gc.get_referrers(tensor))
    walk(model)
    gc.collect()
    assert len(gc.get_referrers(tensor)) == before
    assert set(model.__dict__) == set(nn.Module().__dict__) | {"a", "b"}
