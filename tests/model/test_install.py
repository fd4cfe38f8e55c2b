"""Meta tensors take memory as the last step: the same objects, all of them or none."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from subclasses import Pair
from torch import nn

import tensorfork
from tensorfork.testing import FaultyTransport, faults
from tensorfork.transports.zeromq import ZeroMQ

SECONDS = 20.0


class Model(nn.Module):
    """Tied, viewed and quantized tensors; every element is the number."""

    def __init__(self, number: int, device: str = "cpu") -> None:
        super().__init__()
        value = float(number)
        with torch.device(device):
            self.weight = nn.Parameter(torch.full((6, 4), value))
            self.tied = self.weight
            self.register_buffer("table", torch.full((8,), value))
            with torch.no_grad():
                self.half = self.table[4:]
                self.row = self.weight[1]
            self.quantized = Pair(torch.full((3, 4), number, dtype=torch.int8), torch.full((1,), value))
            self.scale = self.quantized.scale
            self.parts = [torch.full((2,), value), {"k": torch.full((), value)}]

    def all(self) -> list[torch.Tensor]:
        return [self.weight, self.table, self.half, self.row, self.quantized, self.scale, *self.inner()]

    def inner(self) -> list[torch.Tensor]:
        return [self.quantized.data_, self.parts[0], self.parts[1]["k"]]


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(Model(3)) as seed:
        yield seed


def fork(model: nn.Module, seed: tensorfork.Seed, **arguments: Any) -> tensorfork.ForkReport:
    return tensorfork.fork_into(model, seed.address, timeout=SECONDS, device="cpu", **arguments)


def test_every_meta_tensor_takes_memory_and_stays_the_same_object(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    before = model.all()
    fork(model, seed)
    assert all(one is other for one, other in zip(model.all(), before, strict=True))
    assert model.quantized.scale is model.scale
    assert {tensor.device.type for tensor in before} == {"cpu"}
    assert all(bool((tensor == 3).all()) for tensor in before if not isinstance(tensor, Pair))
    assert torch.equal(model.quantized + 0, torch.full((3, 4), 9.0))


def test_views_of_meta_tensors_are_views_of_what_those_become(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    fork(model, seed)
    with torch.no_grad():
        model.weight.fill_(7)
        model.table.fill_(8)
    assert torch.equal(model.row, torch.full((4,), 7.0))
    assert torch.equal(model.half, torch.full((4,), 8.0))


def test_a_view_made_under_autograd_takes_memory_with_what_it_views(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    model.row = model.weight[1]
    assert model.row.grad_fn is not None
    fork(model, seed)
    assert torch.equal(model.row, torch.full((4,), 3.0))
    (model.weight * 2).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((6, 4), 2.0))


def test_a_tensor_made_of_others_keeps_its_attributes(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    model.quantized.note = {"bits": 4, "loader": self_made}
    fork(model, seed)
    assert model.quantized.note == {"bits": 4, "loader": self_made}
    assert set(model.quantized.__dict__) == {"data_", "scale", "note"}


def self_made() -> None: ...


class Loaded(nn.Parameter):
    """Like an engine's parameters: it has attributes for loading, in a slot and in its dictionary."""

    __slots__ = ("rank",)


@pytest.mark.parametrize("weak", [False, True], ids=["without a weak reference", "with one"])
def test_a_parameter_keeps_its_class_its_slots_and_its_attributes(weak: bool) -> None:
    def made(device: str) -> nn.Module:
        model = nn.Module()
        model.w = Loaded(torch.ones(3, device=device), requires_grad=False)
        model.w.rank, model.w.loader = 3, self_made
        return model

    model = made("meta")
    weight = model.w
    reference = weakref.ref(weight) if weak else None
    with tensorfork.publish(made("cpu")) as other:
        fork(model, other)
    assert reference is None or reference() is weight
    assert (type(weight), weight.rank, weight.loader) == (Loaded, 3, self_made)
    assert torch.equal(weight, torch.ones(3))


def test_a_quantized_parameter_stays_one(seed: tensorfork.Seed) -> None:
    def layer(device: str) -> nn.Module:
        made = nn.Module()
        whole = Pair(torch.ones(3, 4, dtype=torch.int8, device=device), torch.ones(1, device=device))
        made.weight = nn.Parameter(whole, requires_grad=True)
        return made

    model = layer("meta")
    weight = model.weight
    with tensorfork.publish(layer("cpu")) as other:
        fork(model, other)
    assert model._parameters["weight"] is weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Pair)
    assert weight.requires_grad
    assert weight.device.type == "cpu"


def test_weak_references_find_the_tensor_as_it_is_now(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    references = [weakref.ref(tensor) for tensor in model.all()]
    fork(model, seed)
    assert all(reference() is tensor for reference, tensor in zip(references, model.all(), strict=True))
    assert {tensor.device.type for tensor in model.all()} == {"cpu"}
    assert torch.equal(model.quantized + 0, torch.full((3, 4), 9.0))
    assert torch.equal(model.half, torch.full((4,), 3.0))


def test_an_lstm_which_has_weak_references_to_its_weights_computes_as_the_seed_s_does() -> None:
    source = nn.LSTM(3, 5, num_layers=2)
    with torch.device("meta"):
        model = nn.LSTM(3, 5, num_layers=2)
    with tensorfork.publish(source) as other:
        fork(model, other)
    x = torch.ones(4, 1, 3)
    assert torch.equal(model(x)[0], source(x)[0])
    assert all(one is other for one, other in zip(model._flat_weights, model.parameters(), strict=True))


# What cannot take memory is refused before a byte moves.


def refused(model: nn.Module, seed: tensorfork.Seed, match: str, **arguments: Any) -> None:
    moved: list[int] = []
    with pytest.raises(tensorfork.UnsupportedTensor, match=match):
        fork(model, seed, progress=lambda done, total: moved.append(done), **arguments)
    assert not moved
    assert {tensor.device.type for tensor in model.all() if tensor is not None} == {"meta"}


def test_a_view_that_is_not_in_the_model_is_refused_by_the_name_of_what_it_views(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    outside = model.parts[0][:1]
    granted = seed.stats().granted
    refused(model, seed, r"^parts\[0\] is on the meta device and cannot take memory in place: a view")
    assert seed.stats().granted == granted, "the seed granted a lease to a fork that cannot succeed"
    del outside
    gc.collect()
    fork(model, seed)


def test_a_tensor_whose_inner_one_is_left_out_is_refused(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    refused(
        model, seed, "^quantized is on the meta device and cannot take memory without its 'data_'", exclude="*.data_"
    )


def test_what_is_left_out_entirely_stays_meta(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    report = fork(model, seed, exclude=["quantized", "scale"])
    assert model.quantized.is_meta
    assert model.scale.is_meta
    assert not model.weight.is_meta
    assert report.left_out == ("quantized.data_", "quantized.scale", "scale")


def test_a_subclass_that_cannot_be_put_together_again_is_refused_by_name(seed: tensorfork.Seed) -> None:
    class Stuck(Pair):
        @classmethod
        def __tensor_unflatten__(cls, *_: Any) -> Pair:
            raise RuntimeError("never")

    model = Model(0, "meta")
    model.quantized = Stuck(model.quantized.data_, model.scale)
    refused(model, seed, "^quantized: this Stuck cannot be put together again: never")


def test_a_subclass_that_comes_back_as_something_else_is_refused_by_name(seed: tensorfork.Seed) -> None:
    class Other(Pair):
        @classmethod
        def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Pair:
            return Pair(inner["data_"], inner["scale"])

    model = Model(0, "meta")
    model.quantized = Other(model.quantized.data_, model.scale)
    refused(model, seed, "^quantized: this Other, put together again, is another kind of tensor")


# All or none.


class Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(saved)
        return x * 2


@pytest.mark.parametrize("which", ["weight", "half", "scale", "quantized"])
def test_one_that_refuses_at_the_last_moment_leaves_all_as_they_were(seed: tensorfork.Seed, which: str) -> None:
    """While the bytes are moving, something begins to refer to a tensor: a graph of computations, which saves it."""
    model = Model(0, "meta")
    held: list[Any] = []

    def grab(done: int, total: int) -> None:
        if not held:
            held.append(Hold.apply(torch.ones(1, requires_grad=True), getattr(model, which)))

    with pytest.raises(tensorfork.UnsupportedTensor, match=r"cannot take its memory in place.*All are as they were"):
        fork(model, seed, progress=grab)
    assert {tensor.device.type for tensor in model.all()} == {"meta"}
    assert model.quantized.scale is model.scale
    assert model.half.untyped_storage()._cdata == model.table.untyped_storage()._cdata
    held.clear()
    fork(model, seed)
    assert torch.equal(model.half, torch.full((4,), 3.0))
    assert torch.equal(model.quantized + 0, torch.full((3, 4), 9.0))


def test_a_copy_that_is_not_the_seed_s_leaves_all_meta(seed: tensorfork.Seed) -> None:
    model = Model(0, "meta")
    with pytest.raises(tensorfork.VerificationFailed):
        fork(model, seed, transport=FaultyTransport(ZeroMQ(), faults.Flip()))
    assert {tensor.device.type for tensor in model.all()} == {"meta"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_caller_s_mode_does_not_matter(seed: tensorfork.Seed, mode: Any) -> None:
    model = Model(0, "meta")
    with mode():
        fork(model, seed)
    assert not model.weight.is_inference()
    assert model.weight.requires_grad
    (model.weight.sum() * 2).backward()
    assert torch.equal(model.row, torch.full((4,), 3.0))


# Tensors that have memory are filled in place.


def test_the_inner_tensors_are_filled_and_autograd_is_told_of_the_whole(seed: tensorfork.Seed) -> None:
    model = Model(0)
    before = [(tensor, id(tensor), tensor._version) for tensor in model.all()]
    fork(model, seed)
    for tensor, was, version in before:
        assert id(tensor) == was
        assert tensor._version > version
    assert torch.equal(model.quantized + 0, torch.full((3, 4), 9.0))
