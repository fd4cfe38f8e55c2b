"""Every tensor of a model is found, wherever it is kept, under a name that says where; no code of the model runs."""

import argparse
import collections
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import Frozen, Plain, Range, Scales, Side, Slotted, Under, module, names, one
from subclasses import Pair
from torch import nn

import tensorfork
from tensorfork.model.selection import Selection
from tensorfork.model.walk import walk

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
