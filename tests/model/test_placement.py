"""Distributed tensors are forked shard by shard, and a shard only from one of the same part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import tensorfork
from tensorfork.model.walk import walk

SECONDS = 20.0


@contextmanager
def rank(index: int, size: int = 4) -> Iterator[None]:
    """This process is one rank of several, of which no other exists: placements need no more."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=index, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(index: int) -> DeviceMesh:
    """A mesh named after the rank: torch caches what it computes for equal meshes, as a process has one rank only."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(f"dp seen by {index}", "tp"))


def shard(mesh: DeviceMesh, placements: Any, value: float = 0, device: str = "cpu") -> DTensor:
    return DTensor.from_local(torch.full((4, 6), float(value), device=device), mesh, placements, run_check=False)


def sharded(index: int, placements: Any, value: float = 0, device: str = "cpu") -> nn.Module:
    with rank(index):
        mesh = mesh_of(index)
        model = nn.Module()
        model.w = nn.Parameter(shard(mesh, placements, value, device))
        return model


def placement(index: int, placements: Any) -> str:
    with rank(index):
        mesh = mesh_of(index)
        return repr(tensorfork.Placement.of(shard(mesh, placements)))


def test_a_local_shard_goes_by_the_name_of_the_whole() -> None:
    model = sharded(0, [Replicate(), Shard(0)], 3)
    found = walk(model)
    assert list(found.tensors) == ["w"]
    assert found.tensors["w"] is model.w._local_tensor
    assert found.placements == {"w": tensorfork.Placement((8, 6), "Replicate(), Shard(dim=0) 0/2")}


def test_a_placement_says_which_part_of_the_whole_it_is() -> None:
    assert placement(0, [Replicate(), Shard(0)]) == "Replicate(), Shard(dim=0) 0/2 of (8, 6)"
    assert placement(3, [Replicate(), Shard(0)]) == "Replicate(), Shard(dim=0) 1/2 of (8, 6)"
    assert placement(2, [Shard(0), Shard(1)]) == "Shard(dim=0) 1/2, Shard(dim=1) 0/2 of (8, 12)"
    assert placement(1, [Replicate(), Partial()]) == "Replicate(), Partial(sum) 1/2 of (4, 6)"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("replica", [1, 3])
def test_a_shard_is_filled_from_the_same_shard_of_any_replica(replica: int, device: str) -> None:
    model = sharded(replica, [Replicate(), Shard(0)], 0, device)
    weight, local = model.w, model.w._local_tensor
    with tensorfork.publish(sharded(1, [Replicate(), Shard(0)], 3)) as seed:
        tensorfork.fork_into(model, seed.address, timeout=SECONDS, device="cpu")
    assert model.w is weight
    assert weight._local_tensor is local
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad
    assert (weight.device.type, weight.shape, weight.placements) == ("cpu", (8, 6), (Replicate(), Shard(0)))
    assert torch.equal(local, torch.full((4, 6), 3.0))


@pytest.mark.parametrize(
    ("index", "placements", "text"),
    [
        (0, [Replicate(), Shard(0)], "Replicate(), Shard(dim=0) 0/2 of (8, 6)"),
        (1, [Replicate(), Shard(1)], "Replicate(), Shard(dim=1) 1/2 of (4, 12)"),
        (1, [Replicate(), Replicate()], "Replicate(), Replicate() of (4, 6)"),
        (1, [Shard(0), Replicate()], "Shard(dim=0) 0/2, Replicate() of (8, 6)"),
        (1, [Replicate(), Partial()], "Replicate(), Partial(sum) 1/2 of (4, 6)"),
    ],
)
def test_another_part_of_equal_shape_is_a_mismatch_that_names_both(index: int, placements: Any, text: str) -> None:
    with (
        tensorfork.publish(sharded(1, [Replicate(), Shard(0)], 3)) as seed,
        pytest.raises(tensorfork.LayoutMismatch) as caught,
    ):
        tensorfork.fork_into(sharded(index, placements), seed.address, timeout=SECONDS)
    difference = f"placement Replicate(), Shard(dim=0) 1/2 of (8, 6) in the seed, {text} here"
    assert caught.value.mismatched == (("w", difference),)


def test_a_shard_is_not_a_whole_tensor_of_that_shape() -> None:
    plain = nn.Module()
    plain.w = nn.Parameter(torch.zeros(4, 6))
    with (
        tensorfork.publish(sharded(1, [Replicate(), Shard(0)], 3)) as seed,
        pytest.raises(tensorfork.LayoutMismatch, match=r"placement Replicate\(\), Shard.* in the seed, whole here"),
    ):
        tensorfork.fork_into(plain, seed.address, timeout=SECONDS)


def test_a_mesh_is_no_part_of_the_model() -> None:
    with rank(0):
        model = nn.Module()
        model.mesh = init_device_mesh("cpu", (2, 2))
        model.groups = [dist.group.WORLD]
        assert not walk(model).tensors
