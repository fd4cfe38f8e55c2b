"""Destinations: memory for what a fork brings, in one allocation or in many, shared as the model's is."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GENERATED, Tied, tensors_of
from torch.multiprocessing.reductions import StorageWeakRef
from whole_forks import on_meta

from tensorfork import ModelLayout, StorageLayout, TensorLayout
from tensorfork.fork.destination import (
    Destination,
    DestinationMemory,
    memory_for,
    memory_for_all,
    tensors_of_copy,
    tensors_of_model,
)
from tensorfork.fork.match import match
from tensorfork.fork.new_storages import allocate, device_chooser
from tensorfork.fork.slots import Slot
from tensorfork.model.describe import describe
from tensorfork.model.storages import ALIGNMENT

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def filled(seed: Any, model: Any, device: Any = None, *, arena: bool = True) -> tuple[DestinationMemory, Destination]:
    theirs, ours = describe(seed).layout, describe(model)
    memory = memory_for(match(theirs, ours.layout), theirs, ours, device, arena=arena)
    return memory, tensors_of_model(ours, memory)


# Allocations.


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(0, 3000), max_size=8))
def test_new_storages_lie_aligned_in_one_allocation_and_apart(sizes: list[int]) -> None:
    new = allocate({i: Slot(torch.device("cpu"), size) for i, size in enumerate(sizes)}, arena=True)
    assert len(new.buffers) == (1 if sizes else 0)
    for region in new.regions:
        base = new.buffers[0]
        assert base.data_ptr() <= region.address <= region.address + region.nbytes <= base.data_ptr() + base.nbytes
        assert (region.address - base.data_ptr()) % ALIGNMENT == 0
        assert region.nbytes == sizes[region.id]
    for region, other in itertools.combinations(new.regions, 2):
        assert region.address + region.nbytes <= other.address or other.address + other.nbytes <= region.address
    assert [region.id for region in new.regions] == [i for i, size in enumerate(sizes) if size]


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(0, 3000), max_size=8))
def test_without_an_arena_each_is_an_allocation_of_just_its_bytes(sizes: list[int]) -> None:
    new = allocate({i: Slot(torch.device("cpu"), size) for i, size in enumerate(sizes)}, arena=False)
    assert [buffer.untyped_storage().nbytes() for buffer in new.buffers] == sizes
    assert [(region.id, region.nbytes) for region in new.regions] == [(i, size) for i, size in enumerate(sizes) if size]
    for region in new.regions:
        assert region.address == new.buffers[region.id].data_ptr()


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
@pytest.mark.parametrize("name", GENERATED)
def test_a_copy_without_a_model_has_the_seed_s_tensors_ties_and_sharing(name: str, arena: bool) -> None:
    model = GENERATED[name]()
    layout = describe(model).layout
    copy = tensors_of_copy(memory_for_all(layout, None, arena=arena))
    theirs = tensors_of(model)
    assert list(copy.tensors) == list(theirs)
    for mine, other in itertools.combinations(list(copy.tensors)[:40], 2):
        a, b, x, y = copy.tensors[mine], copy.tensors[other], theirs[mine], theirs[other]
        if x.numel() and y.numel() and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr():
            assert a.data_ptr() - b.data_ptr() == x.data_ptr() - y.data_ptr()
    for one in layout.tensors:
        made = copy.tensors[one.name]
        assert (made.dtype, made.shape, made.stride()) == (theirs[one.name].dtype, one.shape, one.stride)
    storages = len({tensor.untyped_storage()._cdata for tensor in copy.tensors.values()})
    assert storages <= 1 if arena else storages == len(layout.storages)


def test_ties_are_one_tensor_under_several_names() -> None:
    layout = describe(Tied()).layout
    copy = tensors_of_copy(memory_for_all(layout, None))
    assert copy.tensors["head.weight"] is copy.tensors["embedding.weight"]
    assert copy.tensors["one.weight"] is not copy.tensors["other.weight"]


def test_only_what_is_on_the_meta_device_gets_new_memory() -> None:
    model = Tied()
    model.embedding = on_meta(lambda: torch.nn.Embedding(50, 8))
    model.head.weight = model.embedding.weight
    _, destination = filled(Tied(), model)
    for name, tensor in tensors_of(model).items():
        assert (destination.tensors[name] is tensor) == (not tensor.is_meta)
    assert destination.tensors["head.weight"] is destination.tensors["embedding.weight"]
    destination.install()
    assert not model.embedding.weight.is_meta


def test_a_model_that_has_its_memory_gets_none() -> None:
    model = Tied()
    memory, destination = filled(Tied(), model)
    assert dict(destination.tensors) == tensors_of(model)
    assert {region.address for region in memory.regions} <= {t.data_ptr() for t in tensors_of(model).values()}


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
@pytest.mark.parametrize("name", [name for name in GENERATED if name not in ("many", "nothing")])
def test_every_region_has_a_number_of_its_own_and_every_pair_lies_in_one(name: str, arena: bool) -> None:
    """Also where new memory and old are mixed."""
    model = GENERATED[name]()
    if isinstance(model, dict):
        first = next(iter(model))
        model[first] = torch.empty_strided(
            model[first].shape, model[first].stride(), dtype=model[first].dtype, device="meta"
        )
    memory, destination = filled(GENERATED[name](), model, arena=arena)
    sizes = {region.id: region.nbytes for region in memory.regions}
    assert len(sizes) == len(memory.regions)
    for pair in memory.filled:
        if pair.ours.numel:
            assert pair.ours.offset + pair.ours.extent <= sizes[pair.ours.storage]
            address = next(region.address for region in memory.regions if region.id == pair.ours.storage)
            assert address + pair.ours.offset == destination.tensors[pair.name].data_ptr()


def test_meta_tensors_keep_the_strides_they_had_where_those_do_not_matter() -> None:
    """A kernel of one pixel in channels-last: what is chosen for it depends on strides that reach no other element."""
    source = torch.nn.Conv2d(3, 8, 1).to(memory_format=torch.channels_last)
    model = on_meta(lambda: torch.nn.Conv2d(3, 8, 1)).to(memory_format=torch.channels_last)
    stride = model.weight.stride()
    assert stride != (3, 1, 1, 1)
    filled(source, model)[1].install()
    assert model.weight.stride() == stride


def test_a_tensor_filled_in_place_has_a_new_version_and_one_that_took_memory_needs_none() -> None:
    model = {"old": torch.zeros(3), "new": torch.empty(3, device="meta")}
    _, destination = filled({"old": torch.ones(3), "new": torch.ones(3)}, model)
    destination.install()
    before = {name: tensor._version for name, tensor in model.items()}
    destination.mark_changed()
    assert {name: tensor._version - before[name] for name, tensor in model.items()} == {"old": 1, "new": 0}


class Two(torch.nn.Module):
    """An embedding and a head, tied or not, and a buffer with a view of it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(300.0))
        with torch.no_grad():
            self.part = self.table[100:200]


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
def test_new_tensors_share_memory_as_the_model_s_do_and_not_as_the_seed_s(arena: bool) -> None:
    for tied in (True, False):
        model = on_meta(lambda tied=tied: Two(tied))
        filled(Two(True), model, arena=arena)[1].install()
        with torch.no_grad():
            model.embedding.weight.fill_(1)
            model.head.weight.fill_(2)
            model.table.fill_(3)
        assert bool((model.embedding.weight == (2 if tied else 1)).all())
        assert bool((model.part == 3).all())


def test_without_an_arena_a_tensor_that_is_freed_frees_its_bytes() -> None:
    model = on_meta(lambda: Two(False))
    memory, destination = filled(Two(True), model, arena=False)
    destination.install()
    del memory, destination
    assert model.head.weight.untyped_storage().nbytes() == 50 * 8 * 4
    head, embedding, table = (
        StorageWeakRef(one.untyped_storage()) for one in (model.head.weight, model.embedding.weight, model.table)
    )
    del model.head
    assert head.expired()
    del model.table
    assert not embedding.expired()
    assert not table.expired(), "a view of it is still there"
    del model.part
    assert table.expired()


def test_in_an_arena_one_tensor_that_is_kept_keeps_all() -> None:
    """What the test above would be without `arena=False`."""
    model = on_meta(lambda: Two(False))
    filled(Two(True), model)[1].install()
    head = StorageWeakRef(model.head.weight.untyped_storage())
    del model.head
    assert not head.expired()


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
def test_a_meta_tensor_takes_the_seed_s_strides_and_stays_the_same_object(arena: bool) -> None:
    model = {"w": torch.empty(4, 6, device="meta"), "other": torch.empty(3, device="meta")}
    weight = model["w"]
    seed = {"w": torch.randn(6, 4).t(), "other": torch.randn(3)}
    memory, destination = filled(seed, model, arena=arena)
    assert {pair.name: pair.ours.stride for pair in memory.filled} == {"w": (1, 4), "other": (1,)}
    destination.install()
    assert model["w"] is weight
    assert (weight.shape, weight.stride()) == ((4, 6), (1, 4))


# Places.


CPU, GPU, OTHER_GPU = (StorageLayout(8, device) for device in ("cpu", "cuda:1", "cuda:2"))


def test_storages_go_where_they_are_told_to() -> None:
    where = device_chooser([CPU, GPU], torch.device("cpu"))
    assert {where(storage) for storage in (CPU, GPU)} == {torch.device("cpu")}


def test_storages_of_the_cpu_stay_there() -> None:
    assert device_chooser([CPU], None)(CPU) == torch.device("cpu")


@no_gpu
def test_a_seed_on_a_gpu_is_forked_to_the_cpu_only_when_that_is_said() -> None:
    with pytest.raises(ValueError, match=r"the seed's model is on cuda:1 and there is no GPU here; say device='cpu'"):
        device_chooser([GPU], None)(GPU)


@pytest.mark.gpu
def test_a_seed_on_one_gpu_goes_to_the_current_one_whatever_its_number() -> None:
    assert device_chooser([GPU], None)(GPU) == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_a_seed_on_gpus_that_are_not_here_is_an_error_that_names_them() -> None:
    far = StorageLayout(8, "cuda:99")
    with pytest.raises(ValueError, match=r"cuda:1, cuda:99, not all of them here; say device="):
        device_chooser([GPU, far], None)(far)


def test_a_layout_s_tensor_is_made_at_its_own_place() -> None:
    layout = ModelLayout(
        (TensorLayout("t", "int16", (2, 2), (4, 1), 1, 6),), (StorageLayout(7, "cpu"), StorageLayout(100, "cpu"))
    )
    new = allocate({i: Slot(torch.device("cpu"), one.nbytes) for i, one in enumerate(layout.storages)}, arena=True)
    tensor = new.tensor(layout.tensors[0])
    assert tensor.data_ptr() - new.buffers[0].data_ptr() == ALIGNMENT + 6
    assert (tensor.shape, tensor.stride()) == ((2, 2), (4, 1))
