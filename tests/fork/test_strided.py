"""Tensors in thousands of stretches: through scratch of bounded size, and with their gaps left as they are."""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from threading import Event
from typing import ClassVar

import pytest
import torch
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfork import Copy, Place, Region, Session, TensorLayout
from tensorfork.fork import strided
from tensorfork.fork.match import match
from tensorfork.fork.strided import Scratch, pull_strided
from tensorfork.model.describe import describe
from tensorfork.runs import MAX_RUNS, grid_of

pytestmark = pytest.mark.slow


@define
class Memory(Session):
    """A session between two stretches of this process's memory, that crosses no edge of either."""

    fabric: ClassVar[str] = "memory"
    theirs: dict[int, Region]
    ours: dict[int, Region]
    copies: list[Copy]

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        for i, copy in enumerate(copies):
            source, into = self.theirs[copy.region], self.ours[copy.into]
            assert 0 <= copy.offset < copy.offset + copy.nbytes <= source.nbytes
            assert 0 <= copy.at < copy.at + copy.nbytes <= into.nbytes
            ctypes.memmove(into.address + copy.at, source.address + copy.offset, copy.nbytes)
            self.copies.append(copy)
            done(i)

    def close(self, deadline: float) -> None: ...


def fill(theirs: torch.Tensor, ours: torch.Tensor) -> list[Copy]:
    """Fill ours from theirs as a fork would; the copies that were made."""
    seed, fork = describe({"t": theirs}), describe({"t": ours})
    pairs = match(seed.layout, fork.layout)
    scratch = Scratch.for_tensors([(pairs[0].ours, ours.device)])
    regions = [*fork.memory.regions(fork.layout), *scratch.regions]
    session = Memory(
        {region.id: region for region in seed.memory.regions(seed.layout)},
        {region.id: region for region in regions},
        [],
    )
    places = {region.id: Place(region.id, 0) for region in regions}
    pull_strided(session, pairs[0], ours, {0: Place(0, 0)}, places, scratch, 0.0, Event())
    return session.copies


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int], torch.dtype]:
    """Shapes and strides of any kind: with gaps, permuted, expanded, overlapping."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.complex64]))
    if draw(st.booleans()):
        return shape, [draw(st.integers(0, 30)) for _ in shape], dtype
    stride, step = [0] * len(shape), 1
    for i in draw(st.permutations(range(len(shape)))):
        step += draw(st.integers(0, 2))
        stride[i], step = step, step * shape[i]
    return shape, stride, dtype


@settings(max_examples=150)
@given(view=views(), room=st.sampled_from([8, 24, 100, 1000]), seed=st.integers(0, 99))
def test_elements_arrive_and_gaps_stay_whatever_the_view_and_the_room(
    view: tuple[list[int], list[int], torch.dtype], room: int, seed: int
) -> None:
    shape, stride, dtype = view
    extent = (sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = torch.randint(0, 256, (2, extent + 64), dtype=torch.uint8, generator=generator)
    source = torch.empty(0, dtype=dtype).set_(theirs.clone().untyped_storage(), 0, shape, stride)
    memory = ours.clone()
    into = torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 32 // dtype.itemsize, shape, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "SCRATCH", room)
        patch.setattr(strided, "max_runs", lambda gapped: 0)
        patch.setattr("tensorfork.layout.is_dense", lambda shape, stride: False)
        copies = fill(source, into)
    assert all(copy.nbytes <= room for copy in copies)
    places = {
        sum(i * step for i, step in zip(index, stride, strict=True)) * dtype.itemsize + k
        for index in itertools.product(*map(range, shape))
        for k in range(dtype.itemsize)
    }
    want = [int(theirs[i - 32]) if i - 32 in places else int(ours[i]) for i in range(len(ours))]
    assert memory.tolist() == want


@settings(max_examples=150)
@given(view=views(), room=st.sampled_from([8, 24, 100, 1000]))
def test_no_stretch_of_a_slab_meets_another(view: tuple[list[int], list[int], torch.dtype], room: int) -> None:
    """Where they did, what is left there would depend on the order in which a GPU copies them."""
    shape, stride, dtype = view
    length, steps = grid_of(TensorLayout("t", str(dtype).removeprefix("torch."), tuple(shape), tuple(stride), 0, 0))
    for _, grid, piece in strided._slabs(length, steps, room):
        starts = sorted(sum(parts) for parts in itertools.product(*(range(0, n * step, step) for step, n in grid)))
        assert all(start + piece <= following for start, following in itertools.pairwise(starts))


def test_scratch_is_as_large_as_a_tensor_needs_and_never_larger_than_its_bound() -> None:
    def room(*tensors: torch.Tensor) -> list[int]:
        found = describe({str(i): tensor for i, tensor in enumerate(tensors)})
        scratch = Scratch.for_tensors([(one, found.tensors[one.name].device) for one in found.layout.tensors])
        return [region.nbytes for region in scratch.regions]

    small = torch.zeros(MAX_RUNS + 1, 3, dtype=torch.uint8)
    huge = torch.empty(MAX_RUNS + 1, 20_000, dtype=torch.uint8)
    assert room(small, small.t(), small[:-1, :2]) == []
    assert room(small[:, :2]) == [3 * MAX_RUNS + 2]
    assert room(small[:, :2], huge[:, 1:]) == [strided.SCRATCH]


def test_slabs_of_a_large_tensor_are_large() -> None:
    """One copy for each row would cost more than the bytes."""
    theirs, ours = torch.randn(2, 40_000, 4)
    copies = fill(theirs[:, :3], ours[:, :3])
    assert torch.equal(theirs[:, :3], ours[:, :3])
    assert len(copies) == 1
