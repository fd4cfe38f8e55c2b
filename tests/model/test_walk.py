"""Every tensor of a model is found, wherever it is kept, under a name that says where; no code of the model runs."""

import argparse
import collections
import enum
import functools
import gc
import logging
import threading
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subclasses import Pair
from torch import nn

import tensorfork
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


# What is found, and under which name.


def test_parameters_and_buffers_keep_the_names_and_the_order_that_torch_gives_them() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model.register_buffer("gone", one(), persistent=False)
    model.tied = model.layers[0]
    model.register_parameter("none", None)
    usual = [
        *(name for name, _ in model.named_parameters(remove_duplicate=False)),
        *(name for name, _ in model.named_buffers(remove_duplicate=False)),
    ]
    assert names(model) == usual
    assert "tied.linear1.weight" in usual


HELD: dict[str, tuple[Any, list[str]]] = {
    "a plain attribute": (one(), ["a"]),
    "a list": ([one(), 3, one()], ["a[0]", "a[2]"]),
    "a tuple": ((one(),), ["a[0]"]),
    "a named tuple": (Range(one(), one()), ["a.low", "a.high"]),
    "a deque": (collections.deque([one()]), ["a[0]"]),
    "a dict": ({"k": one(), 7: one(), None: one()}, ["a['k']", "a[7]", "a[None]"]),
    "a dict of tuples": ({("x", 1): one()}, ["a[('x', 1)]"]),
    "a dict of enumerators": ({Side.LEFT: one()}, ["a[Side.LEFT]"]),
    "a dict of dtypes": ({torch.int8: one()}, ["a[torch.int8]"]),
    "a dict whose keys have no text": ({Plain(): 1, Plain(): one()}, ["a[#1]"]),
    "an ordered dict": (collections.OrderedDict(k=one()), ["a['k']"]),
    "a default dict": (collections.defaultdict(list, {"k": [one()]}), ["a['k'][0]"]),
    "a mapping proxy": (types.MappingProxyType({"k": one()}), ["a['k']"]),
    "a dataclass": (Scales(one(), one(), more=[one()]), ["a.k", "a.v", "a.more[0]"]),
    "an attrs class with slots": (Slotted(one()), ["a.scale"]),
    "a frozen attrs class": (Frozen(one()), ["a.scale"]),
    "slots by hand, and inherited": (Under(), ["a._hidden", "a.own", "a.shown"]),
    "any object": (Plain(scale=one(), _zero=one()), ["a._zero", "a.scale"]),
    "a namespace": (types.SimpleNamespace(k=one()), ["a.k"]),
    "parsed arguments": (argparse.Namespace(k=one()), ["a.k"]),
    "a user dict": (collections.UserDict(k=one()), ["a.data['k']"]),
    "objects in objects": ({"q": [Slotted(Scales(one(), one()))]}, ["a['q'][0].scale.k", "a['q'][0].scale.v"]),
    "a module in a list": ([nn.Linear(2, 2)], ["a[0].weight", "a[0].bias"]),
    "a parameter in a list": ([nn.Parameter(torch.ones(2))], ["a[0]"]),
    "a distribution": (torch.distributions.Normal(torch.zeros(2), torch.ones(2)), ["a.loc", "a.scale"]),
    "no tensor at all": ([1, "x", {2: 3}, Plain(x=None)], []),
}


@pytest.mark.parametrize("where", HELD)
def test_a_tensor_is_found_in(where: str) -> None:
    value, want = HELD[where]
    assert sorted(names(module(a=value))) == sorted(want)


@pytest.mark.parametrize("where", [where for where in HELD if where != "no tensor at all"])
def test_a_fork_fills_what_is_held_in(where: str) -> None:
    """Into a copy of the structure with other bytes, and into one on the meta device."""
    value, _ = HELD[where]
    source = module(a=value)
    with tensorfork.publish(source) as seed:
        for device in ("cpu", "meta"):
            target = module(a=elsewhere(value, device))
            found = dict(walk(target).tensors)
            tensorfork.fork_into(target, seed.address, timeout=20, device="cpu")
            assert {name: id(tensor) for name, tensor in walk(target).tensors.items()} == {
                name: id(tensor) for name, tensor in found.items()
            }
            for name, tensor in walk(source).tensors.items():
                assert torch.equal(tensor, found[name])


def elsewhere(value: Any, device: str) -> Any:
    """A deep copy, with other bytes on another device."""
    import copy

    memo: dict[int, Any] = {}
    for tensor in walk(module(a=value)).tensors.values():
        other = torch.empty_like(tensor, device=device)
        if device != "meta":
            with torch.no_grad():
                other.fill_(99)
        memo[id(tensor)] = nn.Parameter(other) if isinstance(tensor, nn.Parameter) else other
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType(copy.deepcopy(dict(value), memo))
    return copy.deepcopy(value, memo)


def test_a_tensor_s_own_attributes_are_found() -> None:
    """bitsandbytes keeps the scales of a weight so."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.quant_state = Slotted(one(), inner=Slotted(one()))
    assert names(model) == ["weight", "weight.quant_state.scale", "weight.quant_state.inner.scale"]
    absorbed = one()
    absorbed.scale = one()
    assert names(module(w_kc=absorbed)) == ["w_kc", "w_kc.scale"]


def test_what_a_registered_module_holds_has_the_names_of_all_its_places() -> None:
    shared = module(w_kc=[one()])
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert names(model) == ["a.w_kc[0]", "b.0.w_kc[0]"]


def test_what_can_be_reached_in_several_ways_goes_by_the_shortest_name() -> None:
    deep = [one()]
    model = module(z=deep, a=Plain(b=Plain(c=deep)))
    assert names(model) == ["z[0]"]


def test_names_do_not_depend_on_the_order_in_which_attributes_were_set() -> None:
    deep = [one()]
    first, second = module(), module()
    first.x, first.y = Plain(deep=deep), Plain(deep=deep)
    second.y, second.x = Plain(deep=deep), Plain(deep=deep)
    assert names(first) == names(second) == ["x.deep[0]"]


def test_a_tensor_has_every_name_it_can_be_reached_by() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.all = [model.weight, model.weight]
    assert names(model) == ["weight", "all[0]", "all[1]"]
    with tensorfork.publish(model) as seed:
        assert len(seed.layout.storages) == 1


def test_cycles_end() -> None:
    model = module(a=Plain(t=one()), parts=[])
    model.a.back = model
    model.parts += [model.parts, model, model.a]
    model.child = nn.Linear(1, 1, bias=False)
    model.child.parent = [model]
    model.child.add_module("up", model)
    assert sorted(names(model)) == ["a.t", "child.weight"]


def test_a_module_that_contains_itself_ends() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.add_module("me", model)
    assert names(model) == ["weight"]


def test_a_mapping_is_taken_as_it_is_and_nothing_beyond_it() -> None:
    tensor = one()
    tensor.scale = one()
    assert names({"x": tensor, "any name[0]": one()}) == ["x", "any name[0]"]


def test_two_tensors_of_one_name_are_refused() -> None:
    model = module(a=nn.Linear(1, 1, bias=False))
    object.__getattribute__(model, "__dict__")["a"] = Plain(weight=one())
    with pytest.raises(tensorfork.UnsupportedTensor, match=r"a\.weight: two tensors"):
        walk(model)


@settings(max_examples=60)
@given(st.data())
def test_every_tensor_of_a_random_structure_is_found_once_for_each_place(data: st.DataObject) -> None:
    places: list[tuple[str, torch.Tensor]] = []

    def build(path: str, depth: int) -> Any:
        kind = data.draw(st.sampled_from(["tensor", "list", "dict", "object", "slots"] if depth else ["tensor"]))
        if kind == "tensor":
            places.append((path, one()))
            return places[-1][1]
        count = data.draw(st.integers(0, 3))
        if kind == "list":
            return [build(f"{path}[{i}]", depth - 1) for i in range(count)]
        if kind == "dict":
            return {str(i): build(f"{path}['{i}']", depth - 1) for i in range(count)}
        if kind == "slots":
            return Slotted(build(f"{path}.scale", depth - 1), build(f"{path}.inner", depth - 1))
        return Plain(**{f"x{i}": build(f"{path}.x{i}", depth - 1) for i in range(count)})

    found = walk(module(a=build("a", 4))).tensors
    assert {name: id(tensor) for name, tensor in found.items()} == {name: id(tensor) for name, tensor in places}


# What is not run, and where the walk does not look.


def test_no_property_is_run() -> None:
    class Careful(nn.Module):
        @property
        def trap(self) -> torch.Tensor:
            raise AssertionError("a property was run")

        @functools.cached_property
        def later(self) -> torch.Tensor:
            raise AssertionError("a cached property was run")

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


# What cannot be named, or reached, is an error.


def test_tensors_that_only_a_set_holds_are_refused() -> None:
    with pytest.raises(tensorfork.UnsupportedTensor, match=r"a\.inner: a set has no order"):
        walk(module(a=Slotted(None, {one(), one()})))
    with pytest.raises(tensorfork.UnsupportedTensor, match="a: a set has no order"):
        walk(module(a={Side.LEFT, Plain(t=[one()])}))


def test_a_set_of_what_has_names_elsewhere_is_fine() -> None:
    tensor, owner = one(), Plain(t=one())
    assert names(module(a={tensor, owner, 3, "x"}, b=tensor, c=owner)) == ["b", "c.t"]


def test_torch_jit_modules_and_packed_parameters_are_refused_unless_excluded() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(tensorfork.UnsupportedTensor, match=r"the model: torch\.jit keeps"):
        walk(scripted)
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": scripted})
    with pytest.raises(tensorfork.UnsupportedTensor, match=r"b: torch\.jit keeps"):
        walk(model)
    found = walk(model, Selection(exclude="b"))
    assert (list(found.tensors), found.left_out) == (["a.weight"], ("b",))


def test_what_is_no_model_is_a_type_error() -> None:
    for wrong in (3, [one()], one(), Plain(t=one())):
        with pytest.raises(TypeError, match="is not a model"):
            walk(wrong)
    for mapping in ({1: one()}, {"x": 3}):
        with pytest.raises(TypeError, match="a mapping must be of names"):
            walk(mapping)


# Subclasses.


def test_a_subclass_that_is_a_tensor_like_any_other_is_itself() -> None:
    class Marked(nn.Parameter):
        pass

    model = nn.Module()
    model.register_parameter("w", Marked(torch.ones(2)))
    assert walk(model).tensors == {"w": model.w}


def test_a_tensor_made_of_others_is_found_by_its_inner_ones() -> None:
    pair = Pair(one().to(torch.int8), torch.ones(1))
    model = module(a=[pair], b=Pair(Pair(one(), one(1)), one(1)))
    assert sorted(names(model)) == ["a[0].data_", "a[0].scale", "b.data_.data_", "b.data_.scale", "b.scale"]
    assert names({"p": pair}) == ["p.data_", "p.scale"]


def test_one_inner_tensor_can_be_left_out() -> None:
    pair = Pair(one().to(torch.int8), torch.ones(1))
    found = walk(module(a=pair), Selection(exclude="*.scale"))
    assert (list(found.tensors), found.left_out) == (["a.data_"], ("a.scale",))


def test_a_subclass_that_cannot_be_taken_apart_is_an_error_that_names_it() -> None:
    class Broken(Pair):
        def __tensor_flatten__(self) -> tuple[list[str], Any]:
            raise RuntimeError("no")

    with pytest.raises(tensorfork.UnsupportedTensor, match="a: this Broken cannot be taken apart: no"):
        walk(module(a=Broken(one(), one(1))))


# Choosing.


def layered() -> nn.Module:
    model = module(layers=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    for layer in model.layers:
        layer.kv_cache = [one(), one()]
        layer.handler_tensor = torch.tensor([12345])
    return model


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ("*.handler_tensor", ["layers.0.handler_tensor", "layers.1.handler_tensor"]),
        (["*kv_cache"], [f"layers.{i}.kv_cache[{j}]" for i in (0, 1) for j in (0, 1)]),
        (["layers.?.kv_cache[1]"], ["layers.0.kv_cache[1]", "layers.1.kv_cache[1]"]),
        (["layers.1"], [name for name in names(layered()) if name.startswith("layers.1.")]),
        (["layers.1.bias", "nothing"], ["layers.1.bias"]),
        (["layers.0.w"], []),
        ("*", names(layered())),
        ((), []),
    ],
)
def test_what_is_excluded_is_left_out_and_named(exclude: Any, left_out: list[str]) -> None:
    found = walk(layered(), Selection(exclude=exclude))
    assert sorted(found.left_out) == sorted(left_out)
    assert list(found.tensors) == [name for name in names(layered()) if name not in left_out]


def test_only_what_is_included_is_taken_and_of_it_nothing_excluded() -> None:
    found = walk(layered(), Selection(include=["layers.0", "*.bias"], exclude="*.kv_cache"))
    assert list(found.tensors) == ["layers.0.weight", "layers.0.bias", "layers.1.bias", "layers.0.handler_tensor"]
    assert set(found.tensors) | set(found.left_out) == set(names(layered()))


def test_brackets_in_a_pattern_stand_for_themselves() -> None:
    model = module(scales=[one(), one()], scales0=one())
    assert names(model, include="scales[0]") == ["scales[0]"]
    assert names(model, include="scales") == ["scales[0]", "scales[1]"]
    assert names(module(c={"k.v": one(), "k": one()}), include="c['k']") == ["c['k']"]


def test_including_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"include='layers\.2' means no tensor"):
        walk(layered(), Selection(include=["layers.0", "layers.2"]))


def test_patterns_must_be_texts() -> None:
    for wrong in ([3], [""], [None]):
        with pytest.raises(TypeError, match="must be names or patterns"):
            Selection(exclude=wrong)


def test_what_an_excluded_name_shares_with_another_is_still_taken() -> None:
    shared = [one()]
    model = module(a=shared, b=shared, c=shared[0])
    found = walk(model, Selection(exclude="a"))
    assert (list(found.tensors), found.left_out) == (["c", "b[0]"], ())


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
    assert steps(model) < 20 * 20_000


def test_a_walk_leaves_nothing_on_the_model() -> None:
    model = module(a=Slotted(one()), b=[one()])
    tensor = model.b[0]
    before = len(gc.get_referrers(tensor))
    walk(model)
    gc.collect()
    assert len(gc.get_referrers(tensor)) == before
    assert set(model.__dict__) == set(nn.Module().__dict__) | {"a", "b"}
