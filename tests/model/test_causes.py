"""Who else has a hand in tensors on the meta device is named: accelerate's offloading, and torch's old norms."""

import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tensorfork
from tensorfork.model.describe import describe

OFFLOADED = "is on the meta device because accelerate keeps its weights elsewhere.*remove_hook_from_module"


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def hook(**fields: Any) -> Any:
    """What `accelerate.hooks.AlignDevicesHook` of 1.15 has, in as far as it is looked at."""
    return SimpleNamespace(**{"offload": True, "place_submodules": False, **fields})


@pytest.fixture
def accelerate_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))


@pytest.mark.usefixtures("accelerate_imported")
@pytest.mark.parametrize(
    ("where", "placed", "named"),
    [
        ("1.0", hook(), r"^1\.0\.weight .*a hook on '1\.0'"),
        ("1.0", SimpleNamespace(hooks=[hook(offload=False), hook()]), r"^1\.0\.weight .*a hook on '1\.0'"),
        ("1", hook(place_submodules=True), r"^1\.0\.weight .*a hook on '1'"),
        ("", hook(place_submodules=True), r"^1\.0\.weight .*a hook on 'the model'"),
    ],
)
def test_a_model_that_accelerate_offloads_is_refused_with_the_hook(where: str, placed: Any, named: str) -> None:
    model = layers()
    model[1].to("meta")
    model.get_submodule(where).__dict__["_hf_hook"] = placed
    # nobody listens there: it is refused before anybody is asked
    for call in (lambda: tensorfork.publish(model), lambda: tensorfork.fork_into(model, "tcp://127.0.0.1:1")):
        with pytest.raises(tensorfork.UnsupportedTensor, match=OFFLOADED) as raised:
            call()
        assert raised.match(named)
    assert describe(model, tensorfork.model.selection.Selection(exclude="1")).layout.left_out


@pytest.mark.usefixtures("accelerate_imported")
@pytest.mark.parametrize(
    ("where", "placed"), [("1.0", hook(offload=False)), ("1", hook()), ("0", hook(place_submodules=True))]
)
def test_a_hook_that_has_no_part_in_it_is_no_hindrance(where: str, placed: Any) -> None:
    model = layers()
    model[1].to("meta")
    model.get_submodule(where).__dict__["_hf_hook"] = placed
    describe(model)


def test_what_accelerate_itself_offloads_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(layers(), execution_device="cpu")
    with pytest.raises(tensorfork.UnsupportedTensor, match=OFFLOADED):
        tensorfork.publish(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with tensorfork.publish(model) as seed:
        tensorfork.fork_into(layers(), seed.address)


def weight_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


def spectral_norm() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2)))


def test_weight_norm_under_grad_on_the_meta_device_is_named_with_the_remedies() -> None:
    with torch.device("meta"):
        model = weight_norm()
    with tensorfork.publish(weight_norm()) as seed, pytest.raises(tensorfork.UnsupportedTensor) as raised:
        tensorfork.fork_into(model, seed.address)
    assert raised.match(r"^0\.weight_[gv] is on the meta device .* torch.nn.utils.weight_norm has computed 'weight'")
    assert raised.match(r"torch.no_grad\(\).*parametrizations.weight_norm.*remove_weight_norm")
    assert all(tensor.is_meta for tensor in model.parameters())


@pytest.mark.parametrize("make", [weight_norm, parametrized, spectral_norm])
def test_norms_that_are_built_without_a_graph_are_filled(make: Callable[[], nn.Module]) -> None:
    with torch.device("meta"), torch.no_grad():
        model = make()
    source, x = make().eval(), torch.ones(2)
    with tensorfork.publish(source, exclude="0.weight") as seed:
        source(x)  # which binds another tensor to the attribute
        tensorfork.fork_into(model, seed.address, exclude="0.weight")
        in_place = make().eval()
        tensorfork.fork_into(in_place, seed.address, exclude="0.weight")
    assert torch.equal(model.eval()(x), source(x))
    assert torch.equal(in_place(x), source(x))
