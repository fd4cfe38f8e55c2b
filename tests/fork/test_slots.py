"""Where new tensors lie: they share memory as ours do, and lie side by side where the seed's do."""

import pytest
import torch
from bytewise import Byte, Case, bytes_of, cases, layout, tensor
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tensorfork import LayoutMismatch, ModelLayout, Place, StorageLayout, TensorLayout
from tensorfork.fork.cut import cut
from tensorfork.fork.match import match
from tensorfork.fork.pairs import Pair
from tensorfork.fork.slots import Slot, Slots, slots_for, slots_of_copy
from tensorfork.model.storages import ALIGNMENT

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def placed(theirs: ModelLayout, ours: ModelLayout, *, apart: bool = False) -> Slots:
    return slots_for(match(theirs, ours), theirs, lambda _: CPU, apart=apart)


def own(*tensors: TensorLayout) -> ModelLayout:
    """The same tensors, each in a storage of its own."""
    return layout(*(tensor(one.name, one.shape, one.stride, at=(i, 0)) for i, one in enumerate(tensors)))


def copies(theirs: ModelLayout, ours: ModelLayout) -> int:
    """How many copies fill the slots."""
    pairs = match(theirs, ours)
    slots = placed(theirs, ours)
    new = [Pair(pair.theirs, slots.tensors[pair.name]) for pair in pairs]
    places = {i: Place(i, 0) for i in range(len(theirs.storages))}
    return len(cut(new, places, {i: Place(i, 0) for i in slots.slots}, 1 << 20).copies)


@settings(max_examples=300)
@given(case=cases(), apart=st.booleans())
def test_two_of_ours_share_a_byte_in_new_memory_if_and_only_if_they_share_it_now(case: Case, apart: bool) -> None:
    try:
        slots = placed(case.theirs, case.ours, apart=apart)
    except LayoutMismatch:
        assume(False)
    becomes: dict[Byte, Byte] = {}
    for one in case.ours.tensors:
        new = slots.tensors[one.name]
        assert (new.name, new.dtype, new.shape, new.stride) == (one.name, one.dtype, one.shape, one.stride)
        assert new.offset + new.extent <= slots.slots[new.storage].nbytes or not new.numel
        assert new.offset % new.torch_dtype.itemsize == 0
        for byte, into in zip(bytes_of(one), bytes_of(new), strict=True):
            assert becomes.setdefault(byte, into) == into
    assert len(set(becomes.values())) == len(becomes)


@settings(max_examples=200)
@given(case=cases())
def test_a_model_that_lies_as_the_seed_s_does_gets_the_seed_s_storages(case: Case) -> None:
    theirs = case.theirs
    used = [one for one in theirs.tensors if one.numel]
    firsts = {
        storage: min(one.offset for one in used if one.storage == storage) for storage in {t.storage for t in used}
    }
    assume(all(first < ALIGNMENT for first in firsts.values()))
    slots = placed(theirs, theirs)
    for storage in firsts:
        end = max(one.offset + one.extent for one in used if one.storage == storage)
        assert slots.slots[storage] == Slot(CPU, end)
    for one in used:
        new = slots.tensors[one.name]
        assert (new.storage, new.offset) == (one.storage, one.offset)


def test_parameters_in_storages_of_their_own_take_the_seed_s_layouts_as_they_are() -> None:
    theirs = layout(*(tensor(f"t{i}", [10 + i], at=(i, 0)) for i in range(20)))
    ours = layout(*(tensor(f"t{i}", [10 + i], at=(19 - i, 0)) for i in range(20)))
    slots = placed(theirs, ours)
    assert list(slots.slots.items()) == [(i, Slot(CPU, 10 + i)) for i in range(20)]
    assert all(slots.tensors[one.name] is one for one in theirs.tensors)


def test_what_is_tied_in_the_seed_and_two_objects_here_gets_memory_twice() -> None:
    theirs = layout(tensor("a", [700]), tensor("b", [700]))
    slots = placed(theirs, own(*theirs.tensors))
    assert slots.slots == {0: Slot(CPU, 1024 + 700)}
    assert [slots.tensors[name].offset for name in "ab"] == [0, 1024]


def test_ties_of_ours_stay_ties() -> None:
    theirs = layout(tensor("a", [700]), tensor("b", [700]), tensor("c", [700]))
    ours = layout(tensor("a", [700]), tensor("b", [700]), tensor("c", [700], at=(1, 0)))
    slots = placed(theirs, ours)
    assert [slots.tensors[name].offset for name in "abc"] == [0, 0, 1024]


def test_a_view_of_the_seed_s_that_is_an_object_of_its_own_here_gets_memory_of_its_own() -> None:
    theirs = layout(tensor("whole", [400]), tensor("part", [40], at=(0, 40)))
    slots = placed(theirs, own(*theirs.tensors))
    assert slots.slots == {0: Slot(CPU, 512 + 40 + 40)}
    assert slots.tensors["part"].offset == 512 + 40, "as well aligned as in the seed"


def test_tensors_that_the_seed_has_in_one_flat_buffer_stay_side_by_side_and_are_fetched_by_one_copy() -> None:
    flat = layout(*(tensor(f"t{i}", [100], at=(0, 100 * i)) for i in range(50)))
    for ours in (own(*flat.tensors), own(*reversed(flat.tensors))):
        assert placed(flat, ours).slots == {0: Slot(CPU, 5000)}
        assert copies(flat, ours) == 1


def test_of_a_flat_buffer_only_what_is_used_is_allocated() -> None:
    theirs = layout(tensor("first", [100]), tensor("second", [100], at=(0, 100)), tensor("far", [100], at=(0, 10_007)))
    slots = placed(theirs, own(*theirs.tensors))
    assert slots.slots[0].nbytes < 100 + 100 + ALIGNMENT + 100
    assert slots.tensors["far"].offset % ALIGNMENT == 10_007 % ALIGNMENT
    assert copies(theirs, own(*theirs.tensors)) == 2
    alone = layout(tensor("far", [100]))
    end = layout(*theirs.tensors)
    assert placed(ModelLayout(end.tensors[2:], end.storages), alone).slots[0].nbytes < ALIGNMENT + 100


def test_what_shares_a_storage_here_and_not_in_the_seed_shares_one_as_it_does_here() -> None:
    theirs = layout(tensor("q", [8], at=(0, 0)), tensor("k", [8], at=(1, 0)), tensor("v", [8], at=(2, 0)))
    ours = layout(tensor("v", [8], at=(0, 24)), tensor("q", [8], at=(0, 0)), tensor("k", [8], at=(0, 8)))
    slots = placed(theirs, ours)
    assert slots.slots == {3: Slot(CPU, 32)}
    assert [slots.tensors[name].offset for name in "qkv"] == [0, 8, 24]
    assert copies(theirs, ours) == 3


def test_what_shares_a_storage_here_is_as_well_aligned_as_it_was() -> None:
    """The bytes before it are allocated, up to the boundary."""
    theirs = layout(tensor("q", [8], at=(0, 0)), tensor("k", [2], at=(1, 0), dtype="int64"))
    ours = layout(tensor("q", [8], at=(0, 10_003)), tensor("k", [2], at=(0, 10_016), dtype="int64"))
    slots = placed(theirs, ours)
    assert slots.slots == {2: Slot(CPU, 10_032 - 9728)}
    assert [slots.tensors[name].offset for name in "qk"] == [10_003 - 9728, 10_016 - 9728]


def test_what_shares_a_storage_here_goes_to_the_devices_of_the_seed_s() -> None:
    theirs = layout(tensor("q", [8], at=(0, 0)), tensor("k", [8], at=(1, 0)))
    ours = layout(tensor("q", [8], at=(0, 0)), tensor("k", [8], at=(0, 8)))
    slots = slots_for(match(theirs, ours), theirs, [GPU, OTHER_GPU].__getitem__, apart=False)
    assert sorted(slots.slots) == [2, 3]
    assert [slots.slots[slots.tensors[name].storage].device for name in "qk"] == [GPU, OTHER_GPU]


def test_apart_every_storage_of_ours_has_a_slot_of_its_own() -> None:
    theirs = layout(
        tensor("a", [100]), tensor("tied", [100]), tensor("view", [10], at=(0, 30)), tensor("b", [100], at=(0, 103))
    )
    ours = layout(
        tensor("a", [100]), tensor("tied", [100]), tensor("view", [10], at=(0, 30)), tensor("b", [100], at=(1, 0))
    )
    slots = placed(theirs, ours, apart=True)
    assert slots.slots == {0: Slot(CPU, 100), 1: Slot(CPU, 100)}
    places = {name: (one.storage, one.offset) for name, one in slots.tensors.items()}
    assert places == {"a": (0, 0), "tied": (0, 0), "view": (0, 30), "b": (1, 0)}


@pytest.mark.parametrize("apart", [False, True])
def test_tensors_without_elements_need_no_room(apart: bool) -> None:
    theirs = layout(tensor("none", [0, 3]), tensor("nothing", [0]), tensor("some", [5], at=(1, 0)))
    ours = layout(tensor("none", [0, 3]), tensor("nothing", [0], at=(1, 2)), tensor("some", [5], at=(1, 0)))
    slots = placed(theirs, ours, apart=apart)
    assert slots.slots == {0: Slot(CPU, 0), 1: Slot(CPU, 5)}
    assert set(slots.tensors) == {"none", "nothing", "some"}


@settings(max_examples=100)
@given(case=cases())
def test_a_whole_copy_lies_as_the_seed_s_does(case: Case) -> None:
    slots = slots_of_copy(case.theirs, lambda _: CPU)
    assert dict(slots.tensors) == {one.name: one for one in case.theirs.tensors}
    assert {i: slot.nbytes for i, slot in slots.slots.items()} == {
        i: case.theirs.storages[i].nbytes for i in sorted({one.storage for one in case.theirs.tensors})
    }


def test_sizes_that_the_seed_merely_claims_are_not_allocated() -> None:
    theirs = ModelLayout((tensor("a", [8]),), (StorageLayout(1 << 60, "cpu"),))
    assert placed(theirs, layout(tensor("a", [8]))).slots == {0: Slot(CPU, 8)}
