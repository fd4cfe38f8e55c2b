"""Forks into models on the meta device."""

from typing import Any

import pytest
import torch
from models import Tied, fingerprints, scramble, tensors_of
from torch import nn
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


def test_views_of_the_seed_s_share_memory_in_the_copy_as_well(seed_of: Any) -> None:
    base = torch.arange(100.0)
    seed = seed_of({"whole": base, "part": base[10:20]})
    with torch.device("meta"):
        apart = {"whole": torch.empty(100), "part": torch.empty(10)}
    tensorfork.fork_into(apart, seed.address, timeout=SECONDS)
    copy = tensorfork.fork(seed.address, timeout=SECONDS)
    for model in (apart, copy):
        model["part"].fill_(-1.0)
        assert model["whole"][10:20].tolist() == [-1.0] * 10


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
