"""A snapshot is a copy of its own, with the ties, the shared memory and the layout of the model."""

import itertools
from typing import Any

import pytest
import torch
from models import GENERATED, Tied, Views, bits, fingerprints, memory_of, scramble, unused_bytes
from subclasses import Pair
from torch import nn

from tensorfork import TensorLayout
from tensorfork.fork.match import match
from tensorfork.layout import ModelLayout
from tensorfork.model.describe import LocalModel, describe
from tensorfork.model.snapshot import snapshot


def places(layout: ModelLayout) -> list[tuple[TensorLayout, int, int]]:
    """Layouts compare equal without their places."""
    return [(one, one.storage, one.offset) for one in layout.tensors]


def check_copy(copy: LocalModel, model: Any, original: LocalModel) -> None:
    assert fingerprints(dict(copy.tensors)) == fingerprints(model)
    assert places(copy.layout) == places(original.layout)
    assert list(copy.tensors) == list(original.tensors)
    for layout in copy.layout.tensors:
        tensor, address = copy.tensors[layout.name], copy.memory.addresses[layout.storage]
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert tensor.stride() == original.tensors[layout.name].stride()
        assert address is not None
        if layout.numel:
            assert tensor.data_ptr() == address + layout.offset


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("name", GENERATED)
def test_a_snapshot_has_the_model_s_bytes_and_layout_in_memory_of_its_own(name: str, device: str | None) -> None:
    model = GENERATED[name]()
    original = describe(model)
    copy = snapshot(original, device)
    check_copy(copy, model, original)
    assert copy.layout == original.layout
    again = describe(dict(copy.tensors)).layout
    assert (places(again), again.storages) == (places(original.layout), original.layout.storages)
    before = fingerprints(model)
    scramble(model)
    assert fingerprints(dict(copy.tensors)) == before


@pytest.mark.parametrize("name", ["tied", "views", "strided", "small", "overlapping"])
def test_a_change_of_the_snapshot_does_not_change_the_model(name: str) -> None:
    model = GENERATED[name]()
    before = fingerprints(model)
    scramble(dict(snapshot(describe(model)).tensors))
    assert fingerprints(model) == before


def test_ties_are_one_tensor_and_views_share_its_memory() -> None:
    copy = snapshot(describe(Tied())).tensors
    assert copy["head.weight"] is copy["embedding.weight"]
    assert copy["one.table"] is copy["table"]
    assert copy["one.weight"] is not copy["other.weight"]
    views = snapshot(describe(Views())).tensors
    views["qkv"].fill_(7)
    assert bool((views["k"] == 7).all())
    views["late"].view(torch.uint8).fill_(0)
    assert not views["bytes"].any()


def test_it_takes_as_much_memory_as_the_model_s_storages_each_in_an_allocation_of_its_own() -> None:
    original = describe(Views())
    memory = snapshot(original).memory
    assert [storage.nbytes() for storage in memory.storages] == [one.nbytes for one in original.layout.storages]
    assert memory.addresses == [storage.data_ptr() for storage in memory.storages]
    regions = memory.regions(original.layout)
    for one, other in itertools.combinations(regions, 2):
        assert one.address + one.nbytes <= other.address or other.address + other.nbytes <= one.address


def test_what_lies_between_tensors_is_zero() -> None:
    """Not what the model has there, nor what the heap had: a fork's transport may read whole storages."""
    buffer = torch.full((4000,), 0xAB, dtype=torch.uint8)
    model = {"one": buffer[700:800], "two": buffer[1000:1100], "inner": buffer[1010:1020]}
    original = describe(model)
    junk = [torch.full((original.layout.storages[0].nbytes,), 0xCD, dtype=torch.uint8) for _ in range(50)]
    del junk
    copy = dict(snapshot(original).tensors)
    (unused,) = unused_bytes(copy).values()
    assert len(unused) == 1100 - 512 - 200
    assert not any(unused)
    (whole,) = memory_of(copy).values()
    assert int((whole == 0xAB).sum()) == 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_every_kind_of_element_is_copied_bit_for_bit(dtype: torch.dtype) -> None:
    raw = torch.arange(64 * dtype.itemsize, dtype=torch.uint8) % 2
    model = {"flat": raw.view(dtype), "scalar": raw.view(dtype)[5], "spread": raw.view(dtype)[3].expand(7, 2)}
    copy = snapshot(describe(model)).tensors
    for name, tensor in model.items():
        assert copy[name].dtype == dtype
        assert torch.equal(bits(copy[name].contiguous()), bits(tensor.contiguous()))


def test_strides_stay_where_they_do_not_matter_too() -> None:
    kernel = torch.randn(8, 3, 1, 1).to(memory_format=torch.channels_last)
    assert kernel.stride() != (3, 1, 1, 1)
    assert snapshot(describe({"w": kernel})).tensors["w"].stride() == kernel.stride()


def test_of_tensors_that_are_made_of_others_the_inner_ones_are_copied() -> None:
    module = nn.Module()
    module.quantized = Pair(torch.ones(3, 4, dtype=torch.int8), torch.full((1,), 3.0))
    module.kept = nn.Parameter(torch.ones(2))
    copy = snapshot(describe(module))
    assert set(copy.tensors) == {"quantized.data_", "quantized.scale", "kept"}
    assert not copy.wrappers
    assert {type(tensor) for tensor in copy.tensors.values()} == {torch.Tensor}


def test_memory_that_two_of_torch_s_storages_cover_is_copied_once() -> None:
    """Through DLPack; each has bytes that the other does not reach."""
    base = torch.arange(100.0)
    front, back = torch.from_dlpack(base[:60]), torch.from_dlpack(base[40:])
    model = {"front": front, "back": back}
    copy = snapshot(describe(model))
    assert len(copy.layout.storages) == 1
    assert torch.equal(copy.tensors["front"], base[:60])
    assert torch.equal(copy.tensors["back"], base[40:])
    copy.tensors["front"][50] = -1.0
    assert copy.tensors["back"][10] == -1.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_mode_does_not_matter_and_inference_tensors_are_copied(mode: Any) -> None:
    with mode():
        model = {"w": torch.ones(3)}
        copy = snapshot(describe(model)).tensors
    assert torch.equal(copy["w"], torch.ones(3))
    assert not copy["w"].is_inference()


@pytest.mark.parametrize("name", ["tied", "views", "strided", "overlapping"])
def test_whatever_the_model_would_fill_its_snapshot_fills(name: str) -> None:
    original = describe(GENERATED[name]())
    assert match(snapshot(original).layout, original.layout) == match(original.layout, original.layout)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_snapshot_of_a_gpu_s_tensors_stays_there_or_goes_to_the_host(device: str | None) -> None:
    base = torch.randn(1 << 22, device="cuda")
    model = {"whole": base, "part": base[1000:2000], "spread": base[7].expand(5), "other": torch.ones(3, device="cuda")}
    host = {name: tensor.cpu() for name, tensor in model.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    copy = snapshot(describe(model), device)
    base.fill_(0)
    assert {tensor.device for tensor in copy.tensors.values()} == {torch.device(device or base.device)}
    assert {one.device for one in copy.layout.storages} == {device or str(base.device)}
    assert all(torch.equal(copy.tensors[name].cpu(), tensor) for name, tensor in host.items())
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= (0 if device else base.nbytes + 4096)
    copy.tensors["whole"][1000] = 5
    assert copy.tensors["part"][0] == 5
