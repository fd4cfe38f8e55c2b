"""Forks into models on the meta device."""

import gc
from typing import Any

import pytest
import torch
from models import Tied, fingerprints, scramble, tensors_of
from subclasses import Pair
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from whole_forks import identities, on_meta

import tensorfork
from tensorfork import LayoutMismatch

SECONDS = 60.0


def test_parameters_keep_their_attributes_their_class_and_their_ties(seed_of: Any) -> None:
    class Special(nn.Parameter):
        pass

    model = on_meta(Tied)
    model.one.weight = Special(model.one.weight, requires_grad=False)
    model.one.weight.weight_loader = model.register_buffer
    model.one.weight.output_dim = 1
    before = dict(model.named_parameters())
    tensorfork.fork_into(model, seed_of(Tied()).address, timeout=SECONDS)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert type(model.one.weight) is Special
    assert not model.one.weight.requires_grad
    assert model.other.bias is model.one.bias
    assert (model.one.weight.weight_loader, model.one.weight.output_dim) == (model.register_buffer, 1)
    assert model.head.weight is model.embedding.weight
    assert model.one.table is model.table
    assert fingerprints(model) == fingerprints(Tied())


def test_a_model_that_took_memory_trains_like_another(seed_of: Any) -> None:
    source, model = Tied(), on_meta(Tied)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    losses = []
    for one in (source, model):
        loss = one.head(one.one(one.embedding(torch.arange(5)))).square().sum()
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        losses.append(loss)
    assert losses[0] == losses[1]
    assert fingerprints(source) == fingerprints(model)


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
def test_what_shares_memory_in_the_seed_shares_it_in_a_copy_and_not_in_a_model_where_it_does_not(
    seed_of: Any, arena: bool
) -> None:
    base = torch.arange(100.0)
    seed = seed_of({"whole": base, "part": base[10:20], "again": base})
    with torch.device("meta"):
        apart = {"whole": torch.empty(100), "part": torch.empty(10), "again": torch.empty(100)}
    report = tensorfork.fork_into(apart, seed.address, timeout=SECONDS, arena=arena)
    assert report.nbytes == 210 * 4
    copy = tensorfork.fork(seed.address, timeout=SECONDS, arena=arena)
    assert copy["again"] is copy["whole"]
    for model, changed in ((apart, False), (copy, True)):
        assert all(torch.equal(model[name], tensor) for name, tensor in seed_tensors(base).items())
        model["part"].fill_(-1.0)
        assert model["whole"][10:20].tolist() == ([-1.0] * 10 if changed else list(range(10, 20)))
        assert model["again"][10:20].tolist() == ([-1.0] * 10 if changed else list(range(10, 20)))


def seed_tensors(base: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"whole": base, "part": base[10:20], "again": base}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_parameters_that_are_one_in_the_seed_do_not_become_one(seed_of: Any, device: str) -> None:
    source = Tied()
    seed = seed_of(source)
    with torch.device(device):
        model = Tied()
        model.head.weight = nn.Parameter(torch.zeros(50, 8))
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(source)
    before = model.embedding.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(model.embedding.weight, before)
    assert torch.equal(model.head.weight, before + 1)


@pytest.mark.parametrize("whole", [False, True], ids=["fork_into", "fork"])
def test_without_an_arena_what_a_model_lets_go_of_is_freed(seed_of: Any, whole: bool) -> None:
    seed = seed_of(Tied())
    if whole:
        held = tensorfork.fork(seed.address, timeout=SECONDS, arena=False)
    else:
        model = on_meta(Tied)
        tensorfork.fork_into(model, seed.address, timeout=SECONDS, arena=False)
        held = tensors_of(model)
        del model
    one, other = (StorageWeakRef(held[name].untyped_storage()) for name in ("one.weight", "other.weight"))
    del held["one.weight"]
    gc.collect()  # a model refers to itself
    assert one.expired()
    assert not other.expired()


def test_parameters_over_one_storage_on_the_meta_device_lie_in_one_afterwards(seed_of: Any) -> None:
    """Three layers fused into one buffer, which the seed has one by one."""
    seed = seed_of({name: torch.full((4, 8), float(i)) for i, name in enumerate("qkv")})
    fused = torch.empty(12, 8, device="meta")
    model = {name: torch.empty(0, device="meta") for name in "qkv"}
    for i, name in enumerate("qkv"):
        model[name].set_(fused.untyped_storage(), 32 * i, (4, 8), (8, 1))
    del fused
    tensorfork.fork_into(model, seed.address, timeout=SECONDS, arena=False)
    (storage,) = {one.untyped_storage()._cdata: one.untyped_storage() for one in model.values()}.values()
    whole = torch.empty(0).set_(storage, 0, (12, 8), (8, 1))
    assert torch.equal(whole, torch.arange(3.0).repeat_interleave(4)[:, None].expand(12, 8))


@pytest.mark.parametrize("parameter", [False, True])
def test_a_meta_tensor_takes_the_seed_s_strides(seed_of: Any, parameter: bool) -> None:
    """A weight that the seed's post-processing transposed in place, and one whose rows have room between them."""
    wide = torch.randn(6, 50)
    source = {"turned": torch.randn(6, 4).t(), "rows": wide[:, :40], "same": torch.randn(3)}
    model = {name: torch.empty(tensor.shape, device="meta") for name, tensor in source.items()}
    if parameter:
        model = {name: nn.Parameter(tensor) for name, tensor in model.items()}
    before = dict(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    for name, tensor in source.items():
        assert model[name] is before[name]
        assert torch.equal(model[name], tensor)
        assert model[name].stride() == tensor.stride()


def test_a_tensor_made_of_others_follows_the_strides_of_what_it_is_made_of(seed_of: Any) -> None:
    source = {"w.data_": torch.ones(4, 3, dtype=torch.int8).t(), "w.scale": torch.ones(1)}
    module = nn.Module()
    with torch.device("meta"):
        module.w = Strided(torch.ones(3, 4, dtype=torch.int8), torch.ones(1))
    weight = module.w
    assert weight.stride() == (4, 1)
    tensorfork.fork_into(module, seed_of(source).address, timeout=SECONDS)
    assert module.w is weight
    assert weight.stride() == weight.data_.stride() == (1, 3)


class Strided(Pair):
    """A pair with the stride of its first part."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, stride: Any = None) -> "Strided":
        return torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=stride or data.stride(), dtype=torch.float32, device=data.device
        )

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, stride: Any = None) -> None:
        super().__init__(data, scale)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> "Strided":
        return cls(inner["data_"], inner["scale"], stride)


def test_a_view_in_the_model_keeps_the_stride_of_what_it_views(seed_of: Any) -> None:
    source = {"w": torch.randn(6, 4).t(), "row": torch.randn(6)}
    weight = torch.empty(4, 6, device="meta")
    model = {"w": weight, "row": weight[1]}
    with pytest.raises(LayoutMismatch, match=r"w: stride .* it shares memory with row here"):
        tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert weight.is_meta


def test_a_model_that_is_partly_on_the_meta_device_is_filled_and_given_memory(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    model.embedding, model.head = on_meta(lambda: (nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)))
    model.head.weight = model.embedding.weight
    there = {name: tensor for name, tensor in tensors_of(model).items() if not tensor.is_meta}
    scramble(there)
    before = identities(there)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(source)
    assert identities(there) == before
    assert model.head.weight is model.embedding.weight


def test_ties_on_the_meta_device_that_the_seed_has_not_are_a_mismatch_and_stay_meta(seed_of: Any) -> None:
    source = Tied()
    source.head.weight = nn.Parameter(torch.ones(50, 8))
    model = on_meta(Tied)
    with pytest.raises(LayoutMismatch, match=r"head\.weight: shares memory with embedding\.weight here"):
        tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert all(tensor.is_meta for tensor in tensors_of(model).values())


@pytest.mark.parametrize("failure", ["mismatch", "no such device", "no such transport", "closed seed"])
def test_a_meta_model_stays_meta_after_a_failure_and_can_be_forked_into_after_that(failure: str) -> None:
    source, model = Tied(), on_meta(Tied)
    with tensorfork.publish(source) as seed, tensorfork.publish({"x": torch.ones(1)}) as other:
        peer, options = seed.address, {"timeout": SECONDS}
        if failure == "mismatch":
            peer = other.address
        elif failure == "no such device":
            options["device"] = "meta"
        elif failure == "no such transport":
            options["transport"] = "pigeon"
        else:
            gone = tensorfork.publish(source)
            gone.close()
            peer, options["timeout"] = gone.address, 0.5
        objects = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        with pytest.raises((tensorfork.TensorForkError, ValueError)):
            tensorfork.fork_into(model, peer, **options)
        assert all(tensor.is_meta for tensor in tensors_of(model).values())
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == objects
    assert fingerprints(model) == fingerprints(source)


def test_the_device_that_is_asked_for_is_used(seed_of: Any) -> None:
    model = on_meta(Tied)
    tensorfork.fork_into(model, seed_of(Tied()).address, device=torch.device("cpu"), timeout=SECONDS)
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}
