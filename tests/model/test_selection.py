"""Choosing among a model's tensors by patterns over their names."""

from typing import Any

import pytest
import torch
from structures import module, names, one
from torch import nn

from tensorfork.model.selection import Selection
from tensorfork.model.walk import walk


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
