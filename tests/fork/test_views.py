"""Tensors that are views: strided, transposed, overlapping, interleaved, in thousands of stretches. Their elements
arrive, in whatever memory they lie, and nothing between them is touched.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import hash_of
from whole_forks import to_meta

import tensorfork
from tensorfork.fork import lease, strided
from tensorfork.runs import MAX_RUNS
from tensorfork.testing import FaultyTransport
from tensorfork.testing.faults import Fault, Job
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow

SECONDS = 20.0
Views = dict[str, torch.Tensor]
Maker = Callable[[torch.Tensor], Views]
"""Makes a model of views of some memory."""


def memory(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def view(raw: torch.Tensor, dtype: torch.dtype, shape: list[int], stride: list[int], at: int = 0) -> torch.Tensor:
    """Of the memory, from element `at` on."""
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), at, shape, stride)


def places(tensor: torch.Tensor) -> torch.Tensor:
    """The offsets in its memory of all bytes of a view's elements."""
    item = tensor.element_size()
    found = torch.arange(item) + tensor.storage_offset() * item
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + torch.arange(size) * step * item).flatten()
    return found


def fork(make: Maker, nbytes: int, transport: tensorfork.Transport | None = None) -> tensorfork.ForkReport:
    """Fork a model of views of known memory into the same views of other memory; every byte is looked at."""
    source, ours = memory(nbytes, 0), memory(nbytes, 1)
    theirs, target, want = make(source), make(ours), ours.clone()
    with tensorfork.publish(theirs, transports=["zeromq"]) as seed:
        report = tensorfork.fork_into(target, seed.address, timeout=SECONDS, transport=transport or "zeromq")
    for tensor in theirs.values():
        elements = places(tensor)
        want[elements] = source[elements]
    assert torch.equal(ours, want)
    return report


MODELS: dict[str, tuple[int, Maker]] = {
    "every other column": (80_000, lambda raw: {"t": view(raw, torch.float32, [100, 50], [100, 2])}),
    "transposed": (80_000, lambda raw: {"t": view(raw, torch.bfloat16, [60, 100], [1, 60], 7)}),
    "a corner of a matrix": (80_000, lambda raw: {"t": view(raw, torch.int16, [20, 30], [200, 1], 3)}),
    "windows that overlap": (80_000, lambda raw: {"t": view(raw, torch.int32, [500, 16], [4, 1])}),
    "windows with gaps inside of them": (80_000, lambda raw: {"t": view(raw, torch.int16, [300, 5], [13, 3])}),
    "thousands of stretches": (200_000, lambda raw: {"t": view(raw, torch.uint8, [5000, 3], [40, 1], 1)}),
    "thousands, transposed": (200_000, lambda raw: {"t": view(raw, torch.int16, [3, 5000], [2, 20])}),
    "thousands that overlap": (200_000, lambda raw: {"t": view(raw, torch.uint8, [3000, 2, 4], [60, 2, 1])}),
    "columns of one matrix, each a tensor": (
        200_000,
        lambda raw: {f"column.{i}": view(raw, torch.int32, [2000, 3], [20, 1], 5 * i) for i in range(4)},
    ),
    "rows of one matrix, each a tensor": (
        80_000,
        lambda raw: {f"row.{i}": view(raw, torch.int64, [70], [1], 100 * i) for i in range(60)},
    ),
    "a matrix, its halves and its transpose": (
        80_000,
        lambda raw: {
            "whole": view(raw, torch.float32, [100, 100], [100, 1]),
            "top": view(raw, torch.float32, [50, 100], [100, 1]),
            "right": view(raw, torch.float32, [100, 50], [100, 1], 50),
            "turned": view(raw, torch.float32, [100, 100], [1, 100]),
        },
    ),
    "a fused weight and its thousands of stretches": (
        200_000,
        lambda raw: {
            "fused": view(raw, torch.int16, [3000, 30], [30, 1]),
            "q": view(raw, torch.int16, [3000, 10], [30, 1]),
            "k": view(raw, torch.int16, [3000, 10], [30, 1], 10),
        },
    ),
    "one memory, read as several dtypes": (
        80_000,
        lambda raw: {"ints": view(raw, torch.int32, [1000], [1]), "bytes": view(raw, torch.uint8, [4000], [1])},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_elements_arrive_and_all_else_stays_as_it_was(kind: str) -> None:
    nbytes, make = MODELS[kind]
    fork(make, nbytes)


@pytest.mark.parametrize("kind", MODELS)
def test_a_meta_model_of_views_is_made_as_the_seed_s_is(kind: str) -> None:
    """Shapes, strides, and who shares memory with whom."""
    nbytes, make = MODELS[kind]
    theirs = make(memory(nbytes, 0))
    target = to_meta(theirs)
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(target, seed.address, timeout=SECONDS)
    first = next(iter(theirs))
    for name, tensor in theirs.items():
        assert hash_of(target[name]) == hash_of(tensor), name
        assert target[name].stride() == tensor.stride()
        assert target[name].data_ptr() - target[first].data_ptr() == tensor.data_ptr() - theirs[first].data_ptr()


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "apart"])
@pytest.mark.parametrize("kind", MODELS)
def test_meta_tensors_that_share_nothing_share_nothing_afterwards_whatever_the_seed_s_do(
    kind: str, arena: bool
) -> None:
    nbytes, make = MODELS[kind]
    theirs = make(memory(nbytes, 0))
    target = {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for name, tensor in theirs.items()
    }
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(target, seed.address, timeout=SECONDS, arena=arena)
    extents = []
    for name, tensor in theirs.items():
        assert hash_of(target[name]) == hash_of(tensor), name
        assert target[name].stride() == tensor.stride()
        start = target[name].untyped_storage().data_ptr()
        extents.append((start + int(places(target[name]).min()), start + int(places(target[name]).max())))
    assert all(end < start for (_, end), (start, _) in pairwise(sorted(extents)))


class Count(Fault):
    """Nothing goes wrong; what was asked for is remembered."""

    def __init__(self) -> None:
        self.pulls: list[list[int]] = []

    def pull(self, job: Job) -> None:
        self.pulls.append([copy.nbytes for copy in job.copies])
        super().pull(job)


def test_what_lies_between_the_rows_does_not_travel_where_the_rows_are_few() -> None:
    count = Count()
    report = fork(
        lambda raw: {"t": view(raw, torch.uint8, [MAX_RUNS, 10], [500, 1])},
        MAX_RUNS * 500,
        FaultyTransport(ZeroMQ(), count),
    )
    assert report.nbytes == MAX_RUNS * 10
    assert count.pulls == [[10] * MAX_RUNS]


def test_thousands_of_stretches_are_a_few_large_copies() -> None:
    count = Count()
    rows = 20 * MAX_RUNS
    report = fork(
        lambda raw: {"t": view(raw, torch.uint8, [rows, 10], [50, 1])}, rows * 50, FaultyTransport(ZeroMQ(), count)
    )
    assert report.nbytes == rows * 10
    assert sum(map(len, count.pulls)) == 1
    assert sum(map(sum, count.pulls)) == (rows - 1) * 50 + 10


def test_scratch_is_bounded_and_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tensors, each ten times as large with its gaps as the scratch may be."""
    room = 1 << 16
    monkeypatch.setattr(strided, "SCRATCH", room)
    made: list[int] = []
    count = Count()

    class Watched(strided.Scratch):
        @classmethod
        def for_tensors(cls, *args: object) -> strided.Scratch:
            scratch = strided.Scratch.for_tensors(*args)  # type: ignore[arg-type]
            made.extend(buffer.nbytes for buffer in scratch.buffers.values())
            return scratch

    monkeypatch.setattr(lease, "Scratch", Watched)
    rows, step = 5000, 131
    fork(
        lambda raw: {f"t.{i}": view(raw, torch.uint8, [rows, 3], [step, 1], 7 + i * rows * step) for i in range(8)},
        8 * rows * step + 64,
        FaultyTransport(ZeroMQ(), count),
    )
    assert made == [room]
    sizes = [nbytes for pull in count.pulls for nbytes in pull]
    assert max(sizes) <= room
    assert len(sizes) == 8 * -(-rows * step // (room // step * step))


@settings(max_examples=40)
@given(st.data())
def test_any_view_of_any_memory_is_forked(data: st.DataObject) -> None:
    """Any shape and stride, any dtype, several in one memory where they share no byte."""
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.int32, torch.complex64]))
    dims = data.draw(st.integers(1, 3))
    count, made, at = data.draw(st.integers(1, 3)), [], data.draw(st.integers(0, 9))
    for _ in range(count):
        shape = [data.draw(st.sampled_from([1, 2, 3, 17, 40])) for _ in range(dims)]
        if data.draw(st.booleans()):
            shape[0] = 1100
        stride = [data.draw(st.sampled_from([1, 2, 3, 41, 130])) for _ in range(dims)]
        made.append((shape, stride, at))
        at += (
            sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 + data.draw(st.integers(0, 3))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "SCRATCH", data.draw(st.sampled_from([4096, 1 << 24])))
        fork(
            lambda raw: {str(i): view(raw, dtype, *one) for i, one in enumerate(made)},
            at * dtype.itemsize + 8,
        )
