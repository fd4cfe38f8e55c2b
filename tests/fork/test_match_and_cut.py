"""From two layouts to copies: every destination byte exactly once, from the right place, and none beside them.

The model of the truth is a dictionary with an entry for every byte.
"""

import itertools
from collections.abc import Sequence

import pytest
from attrs import evolve
from bytewise import Byte, Case, at, bytes_of, cases, conflicting, fetched, layout, places, shapes, tensor, wanted
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tensorfork import Copy, LayoutMismatch, ModelLayout, Place, TensorLayout
from tensorfork.fork import cut as cut_module
from tensorfork.fork.cut import Plan, complete, cut
from tensorfork.fork.match import match
from tensorfork.fork.pairs import Pair
from tensorfork.placement import Placement
from tensorfork.runs import MAX_RUNS, grid_of, runs_of

# Matching.


@settings(max_examples=300)
@given(case=cases())
def test_tensors_pair_by_name_unless_a_byte_would_have_to_be_two(case: Case) -> None:
    by_name = {one.name: one for one in case.theirs.tensors}
    pairs = [Pair(by_name[one.name], one) for one in case.ours.tensors]
    if conflicting(pairs):
        with pytest.raises(LayoutMismatch) as raised:
            match(case.theirs, case.ours)
        assert raised.value.mismatched
        assert not raised.value.missing
        assert not raised.value.unexpected
    else:
        assert match(case.theirs, case.ours) == pairs


def test_a_mismatch_lists_everything_that_is_missing_unexpected_or_different() -> None:
    theirs = layout(
        tensor("same", [2]),
        tensor("dtype", [2], at=(1, 0), dtype="float16"),
        tensor("shape", [2, 3], at=(2, 0)),
        tensor("stride", [2, 3], [1, 2], at=(3, 0)),
        tensor("extra", [1], at=(4, 0)),
        tensor("tied", [4], at=(5, 0)),
        tensor("untied", [4], at=(6, 0)),
        tensor("more", [1], at=(7, 0)),
    )
    ours = layout(
        tensor("same", [2]),
        tensor("dtype", [2], at=(1, 0), dtype="bfloat16"),
        tensor("shape", [3, 2], at=(2, 0)),
        tensor("stride", [2, 3], [3, 1], at=(3, 0)),
        tensor("lacking", [1], at=(4, 0)),
        tensor("tied", [4], at=(5, 0)),
        tensor("untied", [4], at=(5, 0)),
        tensor("lacking too", [1], at=(6, 0)),
    )
    with pytest.raises(LayoutMismatch) as raised:
        match(theirs, ours)
    error = raised.value
    assert error.missing == ("lacking", "lacking too")
    assert error.unexpected == ("extra", "more")
    assert [name for name, _ in error.mismatched] == ["dtype", "shape", "stride", "untied"]
    for name in ("lacking", "lacking too", "extra", "more", "dtype", "shape", "stride", "untied"):
        assert name in str(error)
    assert "8 differences" in str(error)


def test_a_tie_of_the_seed_s_alone_is_copied_to_each_of_ours() -> None:
    theirs = layout(tensor("a", [8]), tensor("b", [8]))
    ours = layout(tensor("a", [8]), tensor("b", [8], at=(1, 0)))
    plan = cut(match(theirs, ours), {0: Place(7, 0)}, {0: Place(0, 0), 1: Place(1, 0)}, 1 << 20)
    assert set(plan.copies) == {Copy(0, 7, 0, 0, 0, 8), Copy(0, 7, 0, 1, 0, 8)}


def test_a_tie_of_ours_alone_is_a_mismatch_that_names_both() -> None:
    theirs = layout(tensor("a", [8]), tensor("b", [8], at=(1, 0)), tensor("c", [8], at=(2, 0)))
    ours = layout(tensor("a", [8]), tensor("b", [8]), tensor("c", [8]))
    with pytest.raises(LayoutMismatch, match="b: shares memory with a here") as raised:
        match(theirs, ours)
    assert [name for name, _ in raised.value.mismatched] == ["b", "c"]


@pytest.mark.parametrize("numbers", list(itertools.permutations(range(3))))
def test_where_the_seed_s_allocator_put_things_is_not_seen_in_what_a_mismatch_names(numbers: tuple[int, ...]) -> None:
    theirs = layout(
        tensor("a", [8], at=(numbers[0], 0)), tensor("b", [8], at=(numbers[1], 0)), tensor("c", [8], at=(numbers[2], 0))
    )
    ours = layout(tensor("a", [8]), tensor("c", [8]), tensor("b", [8]))
    with pytest.raises(LayoutMismatch) as raised:
        match(theirs, ours)
    assert raised.value.mismatched == (
        ("b", "shares memory with c here, and not so in the seed; untie them, or tie the seed's"),
        ("c", "shares memory with a here, and not so in the seed; untie them, or tie the seed's"),
    )


def test_a_tie_of_both_is_copied_once() -> None:
    tied = layout(tensor("a", [8]), tensor("b", [8]))
    assert len(cut(match(tied, tied), {0: Place(7, 0)}, {0: Place(0, 0)}, 1 << 20).copies) == 1


def test_a_view_of_ours_that_is_another_view_in_the_seed_is_a_mismatch() -> None:
    theirs = layout(tensor("whole", [8]), tensor("part", [4], at=(0, 0)))
    ours = layout(tensor("whole", [8]), tensor("part", [4], at=(0, 4)))
    with pytest.raises(LayoutMismatch, match="part: shares memory with whole here"):
        match(theirs, ours)


def test_a_view_behind_a_shorter_one_is_a_conflict_with_the_whole() -> None:
    theirs = layout(tensor("whole", [100]), tensor("part", [10], at=(0, 10)), tensor("other", [10], at=(1, 0)))
    ours = layout(tensor("whole", [100]), tensor("part", [10], at=(0, 10)), tensor("other", [10], at=(0, 50)))
    with pytest.raises(LayoutMismatch, match="other: shares memory with whole here"):
        match(theirs, ours)


def test_views_that_interleave_without_sharing_a_byte_are_no_conflict() -> None:
    """The even and the odd columns of one matrix, which are two matrices of their own in the seed."""
    theirs = layout(tensor("even", [4, 4], [8, 2]), tensor("odd", [4, 4], [8, 2], at=(1, 0)))
    ours = layout(tensor("even", [4, 4], [8, 2]), tensor("odd", [4, 4], [8, 2], at=(0, 1)))
    pairs = match(theirs, ours)
    assert fetched(cut(pairs, *identity(pairs), 1 << 20).copies) == wanted(pairs)


def test_views_that_interleave_and_share_a_byte_are_a_conflict() -> None:
    theirs = layout(tensor("even", [4, 4], [8, 2]), tensor("odd", [4, 4], [8, 3], at=(1, 0)))
    ours = layout(tensor("even", [4, 4], [8, 2]), tensor("odd", [4, 4], [8, 3], at=(0, 1)))
    with pytest.raises(LayoutMismatch):
        match(theirs, ours)


# Strides on the meta device.


def on_meta(*tensors: TensorLayout) -> ModelLayout:
    made = layout(*tensors)
    return evolve(made, storages=tuple(evolve(storage, device="meta") for storage in made.storages))


SHARD = Placement((4, 3), "Shard(dim=0) 0/2")
TRANSPOSED = tensor("w", [2, 3], [1, 2])
GAPPED = tensor("w", [2, 3], [5, 1])
EXPANDED = tensor("w", [2, 3], [0, 1])


@pytest.mark.parametrize("theirs", [TRANSPOSED, GAPPED, EXPANDED], ids=["transposed", "gapped", "expanded"])
def test_a_tensor_on_the_meta_device_may_have_another_stride_than_the_seed_s(theirs: TensorLayout) -> None:
    ours = tensor("w", [2, 3])
    assert match(layout(theirs), on_meta(ours)) == [Pair(theirs, ours)]
    assert match(layout(ours), on_meta(theirs)) == [Pair(ours, theirs)]


def test_a_tensor_that_has_memory_may_not() -> None:
    with pytest.raises(LayoutMismatch, match=r"w: stride \(1, 2\) in the seed, \(3, 1\) here$"):
        match(layout(TRANSPOSED), layout(tensor("w", [2, 3])))


@pytest.mark.parametrize(
    "ours",
    [tensor("w", [3, 2], [2, 1]), tensor("w", [2, 3], dtype="int8"), evolve(tensor("w", [2, 3]), placement=SHARD)],
    ids=["shape", "dtype", "placement"],
)
def test_a_tensor_on_the_meta_device_may_not_differ_in_more_than_its_stride(ours: TensorLayout) -> None:
    with pytest.raises(LayoutMismatch) as raised:
        match(layout(TRANSPOSED), on_meta(ours))
    assert [name for name, _ in raised.value.mismatched] == ["w"]


def test_a_shard_of_a_whole_keeps_its_stride() -> None:
    theirs, ours = evolve(TRANSPOSED, placement=SHARD), evolve(tensor("w", [2, 3]), placement=SHARD)
    with pytest.raises(LayoutMismatch, match="w: stride"):
        match(layout(theirs), on_meta(ours))


def test_where_another_tensor_of_ours_lies_in_the_same_storage_the_stride_stays_and_the_error_says_why() -> None:
    theirs = layout(TRANSPOSED, tensor("row", [3], at=(1, 0)))
    with pytest.raises(
        LayoutMismatch,
        match=r"w: stride \(1, 2\) in the seed, \(3, 1\) here; it shares memory with row here, so it cannot take",
    ):
        match(theirs, on_meta(tensor("w", [2, 3]), tensor("row", [3], at=(0, 6))))


def test_ties_on_the_meta_device_take_another_stride_together() -> None:
    theirs = layout(TRANSPOSED, evolve(TRANSPOSED, name="tied"))
    ours = on_meta(tensor("w", [2, 3]), tensor("tied", [2, 3]))
    assert [pair.name for pair in match(theirs, ours)] == ["w", "tied"]


@pytest.mark.parametrize(
    ("tied", "reason"),
    [
        (tensor("tied", [2, 3]), "w: stride .* it shares memory with tied here, so it cannot take the seed's stride"),
        (tensor("tied", [2, 3], [1, 2], at=(1, 0)), "tied: shares memory with w here, and not so in the seed"),
    ],
    ids=["stride", "memory"],
)
def test_ties_on_the_meta_device_do_not_become_two_different_tensors(tied: TensorLayout, reason: str) -> None:
    with pytest.raises(LayoutMismatch, match=reason):
        match(layout(TRANSPOSED, tied), on_meta(tensor("w", [2, 3]), tensor("tied", [2, 3])))


def identity(pairs: Sequence[Pair]) -> tuple[dict[int, Place], dict[int, Place]]:
    """Every storage a region of its own number."""
    theirs = {pair.theirs.storage: Place(pair.theirs.storage, 0) for pair in pairs}
    return theirs, {pair.ours.storage: Place(pair.ours.storage, 0) for pair in pairs}


# Cutting.


@settings(max_examples=300)
@given(case=cases(), data=st.data())
def test_every_destination_byte_is_brought_once_from_its_own_place_and_no_other_byte_is_touched(
    case: Case, data: st.DataObject
) -> None:
    pairs, theirs, ours, plan, _ = planned(case, data)
    assert not plan.strided
    assert fetched(plan.copies) == {at(into, ours): at(source, theirs) for into, source in wanted(pairs).items()}


@settings(max_examples=300)
@given(case=cases(), data=st.data())
def test_copies_are_in_order_no_longer_than_asked_for_and_cross_no_region_s_edge_on_either_side(
    case: Case, data: st.DataObject
) -> None:
    _, _, _, plan, (their_sizes, our_sizes, piece) = planned(case, data)
    assert list(plan.copies) == sorted(plan.copies, key=lambda copy: (copy.into, copy.at))
    for copy in plan.copies:
        assert 0 < copy.nbytes <= piece
        assert 0 <= copy.offset <= copy.offset + copy.nbytes <= their_sizes[copy.region]
        assert 0 <= copy.at <= copy.at + copy.nbytes <= our_sizes[copy.into]


@settings(max_examples=200)
@given(case=cases(), data=st.data())
def test_copies_are_as_few_as_can_be(case: Case, data: st.DataObject) -> None:
    """What lies side by side on both sides is one copy, cut only where it would be too long."""
    pairs, theirs, ours, plan, (_, _, piece) = planned(case, data)
    moves = sorted((at(into, ours), at(source, theirs)) for into, source in wanted(pairs).items())
    lengths: list[int] = []
    last: tuple[Byte, Byte] | None = None
    for into, source in moves:
        if last == ((into[0], into[1] - 1), (source[0], source[1] - 1)):
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = into, source
    assert len(plan.copies) == sum(-(-length // piece) for length in lengths)


def planned(
    case: Case, data: st.DataObject
) -> tuple[list[Pair], dict[int, Place], dict[int, Place], Plan, tuple[dict[int, int], dict[int, int], int]]:
    try:
        pairs = match(case.theirs, case.ours)
    except LayoutMismatch:
        assume(False)
    theirs, their_sizes = data.draw(places(case.theirs.storages))
    ours, our_sizes = data.draw(places(case.ours.storages))
    piece = data.draw(st.sampled_from([1, 7, 64, 1 << 20]))
    return pairs, theirs, ours, cut(pairs, theirs, ours, piece), (their_sizes, our_sizes, piece)


def test_storages_side_by_side_in_a_region_on_both_sides_are_one_copy() -> None:
    model = layout(*(tensor(f"t{i}", [16], at=(i, 0)) for i in range(5)))
    theirs = {i: Place(3, 1000 + 16 * i) for i in range(5)}
    ours = {i: Place(4, 16 * i) for i in range(5)}
    assert cut(match(model, model), theirs, ours, 1 << 20).copies == (Copy(0, 3, 1000, 4, 0, 80),)


def test_neighbours_in_different_regions_are_never_merged() -> None:
    model = layout(tensor("a", [16]), tensor("b", [16], at=(1, 0)))
    split = {0: Place(3, 0), 1: Place(4, 16)}
    whole = {0: Place(3, 0), 1: Place(3, 16)}
    pairs = match(model, model)
    assert len(cut(pairs, split, whole, 1 << 20).copies) == 2
    assert len(cut(pairs, whole, split, 1 << 20).copies) == 2
    assert len(cut(pairs, whole, whole, 1 << 20).copies) == 1


def test_a_tensor_in_thousands_of_stretches_is_left_to_scratch() -> None:
    comb = tensor("comb", [MAX_RUNS + 1, 2], [5, 1])
    teeth = tensor("teeth", [MAX_RUNS, 2], [5, 1], at=(1, 0))
    pairs = match(layout(comb, teeth), layout(comb, teeth))
    plan = cut(pairs, *identity(pairs), 1 << 20)
    assert [pair.name for pair in plan.strided] == ["comb"]
    assert len(plan.copies) == MAX_RUNS


def test_ties_among_tensors_in_thousands_of_stretches_are_fetched_once() -> None:
    model = layout(*(tensor(name, [MAX_RUNS + 1, 2], [5, 1]) for name in ("a", "b", "c")))
    pairs = match(model, model)
    plan = cut(pairs, *identity(pairs), 1 << 20)
    assert len(plan.strided) == 1


def test_a_tensor_in_thousands_of_stretches_that_another_covers_is_not_fetched_again() -> None:
    model = layout(tensor("whole", [(MAX_RUNS + 1) * 5]), tensor("comb", [MAX_RUNS + 1, 2], [5, 1]))
    pairs = match(model, model)
    plan = cut(pairs, *identity(pairs), 1 << 20)
    assert not plan.strided
    assert len(plan.copies) == 1


@pytest.mark.parametrize("lacking", [0, 1000, MAX_RUNS * 5 + 1], ids=["first", "middle", "last"])
def test_a_tensor_in_thousands_of_stretches_that_others_cover_but_for_a_byte_is_fetched(lacking: int) -> None:
    comb = tensor("comb", [MAX_RUNS + 1, 2], [5, 1])
    left, right = tensor("left", [lacking]), tensor("right", [comb.extent - lacking - 1], at=(0, lacking + 1))
    model = layout(comb, left, right)
    pairs = match(model, model)
    assert [pair.name for pair in cut(pairs, *identity(pairs), 1 << 20).strided] == ["comb"]


@settings(max_examples=200)
@given(case=cases(), data=st.data())
def test_with_what_is_left_to_scratch_every_byte_is_brought_and_no_other(case: Case, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_module, "max_runs", lambda gapped: 3)
        pairs, theirs, ours, plan, _ = planned(case, data)
    left = {at(into, ours): at(source, theirs) for into, source in wanted(plan.strided).items()}
    assert left | fetched(plan.copies) == {at(into, ours): at(source, theirs) for into, source in wanted(pairs).items()}
    assert len({(pair.theirs, pair.ours.storage, pair.ours.offset) for pair in plan.strided}) == len(plan.strided)


# Stretches.


@settings(max_examples=300)
@given(shaped=shapes())
def test_the_stretches_of_a_tensor_are_its_bytes_in_order_and_do_not_touch(
    shaped: tuple[list[int], list[int], str],
) -> None:
    one = tensor("t", shaped[0], shaped[1], dtype=shaped[2])
    runs = runs_of(one, 10_000)
    assert sorted({offset for _, offset in bytes_of(one)}) == [
        offset for start, nbytes in runs for offset in range(start, start + nbytes)
    ]
    assert all(start + nbytes < following for (start, nbytes), (following, _) in itertools.pairwise(runs))
    if one.numel:
        length, steps = grid_of(one)
        offsets = [sum(parts) for parts in itertools.product(*(range(0, n * step, step) for step, n in steps))]
        assert {offset + k for offset in offsets for k in range(length)} == {offset for _, offset in bytes_of(one)}


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_more_stretches_than_the_limit_are_told_by_one_too_many(count: int) -> None:
    assert len(runs_of(tensor("t", [count, 1], [3, 1]), 5)) == min(count, 6)


# What has arrived.


@settings(max_examples=150)
@given(case=cases(), data=st.data())
def test_a_tensor_is_complete_when_all_its_bytes_have_arrived_and_not_before(case: Case, data: st.DataObject) -> None:
    pairs, _, ours, plan, _ = planned(case, data)
    done = [copy for copy in plan.copies if data.draw(st.booleans())]
    got = set(fetched(done))
    assert complete(pairs, ours, done) == [
        pair.name for pair in pairs if all(at(byte, ours) in got for byte in bytes_of(pair.ours))
    ]
