"""Layouts that a lying seed could announce: each loop over one looks at the deadline, and what they cost is bounded."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tensorfork
from tensorfork import ForkCancelled, ModelLayout, PeerUnreachable, Place, StorageLayout, TensorLayout
from tensorfork.fork import connection
from tensorfork.fork.cut import cut
from tensorfork.fork.destination import memory_for, memory_for_all, tensors_of_copy, tensors_of_model
from tensorfork.fork.match import match
from tensorfork.fork.pairs import Pair
from tensorfork.fork.strided import Scratch
from tensorfork.model.describe import describe
from tensorfork.model.selection import Selection
from tensorfork.patience import STEP, looking
from tensorfork.runs import MAX_RUNS, MAX_RUNS_OF_ALL, runs_of
from tensorfork.wire import messages, tables
from tensorfork.wire.pages import PAGE

SECONDS = 20.0
MANY = 6 * STEP
CPU = torch.device("cpu")

Publish = Callable[[Any], tensorfork.Seed]


class Over(Exception):
    pass


class Deadline:
    """A `Check` that passes so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Over


def rows(
    count: int,
    name: str = "t{}",
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    at: Callable[[int], tuple[int, int]] = lambda i: (0, 64 * i),
    device: str = "cpu",
) -> ModelLayout:
    """So many tensors; `at` has the storage and the offset of each."""
    tensors = tuple(TensorLayout(name.format(i), "uint8", shape, stride, *at(i)) for i in range(count))
    storages = max((tensor.storage for tensor in tensors), default=0) + 1
    return ModelLayout(tensors, (StorageLayout(1 << 40, device),) * storages)


def unpack(check: Any) -> object:
    layout = rows(20 * PAGE)
    welcome = messages.Welcome(
        "", b"", len(layout.tensors), 1, 0, "", {}, 0, messages.WeightsVersion("l", 0), left_out=0
    )
    return tables.unpack_layout(*tables.pack_layout(layout), welcome, check)


def making_those_of_a_model(check: Any) -> object:
    ours = describe({f"t{i}": torch.empty(4, dtype=torch.uint8, device="meta") for i in range(MANY)})
    return tensors_of_model(ours, memory_for(match(SMALL, ours.layout), SMALL, ours, None), check)


def same(i: int) -> tuple[int, int]:
    return 0, 0


def strides(step: int) -> dict[str, Any]:
    return {"shape": (2, 3), "stride": (step, 1), "at": same}


GAPPED = rows(MANY, shape=(MAX_RUNS * 2,), stride=(3,), at=same)
FEW = STEP
ALL = MANY // STEP + 1
"""Looks of a loop over `MANY` items."""
LOOPS: dict[str, tuple[Callable[[Any], object], int]] = {
    "unpacking": (unpack, 21 + 2 + 1),  # the pages of tensors, storages and what is left out
    "selecting": (lambda check: rows(MANY).only(lambda name: True, check), ALL),
    "comparing": (lambda check: match(rows(MANY), rows(MANY), None, check), ALL + 1 + MANY + 1),
    "tensors that differ": (
        lambda check: match(rows(MANY, **strides(4)), rows(MANY, **strides(3), device="meta"), None, check),
        ALL + ALL + MANY + 1,
    ),
    "tensors that are one here and many there": (
        lambda check: match(rows(FEW), rows(FEW, at=same), None, check),
        2 + 1 + (FEW + 1) + 2 + (FEW + 1),
    ),
    "interleaved tensors that are one here": (
        lambda check: match(
            rows(9, shape=(300,), stride=(3,)), rows(9, shape=(300,), stride=(3,), at=same), None, check
        ),
        1 + 1 + 10 + 1 + 2701,
    ),
    "a suggestion": (lambda check: match(rows(FEW, "a.b{}.c"), rows(FEW, "w.a.b{}.c"), None, check), 10 * 17 + 7),
    "cutting": (
        lambda check: cut([Pair(one, one) for one in rows(MANY).tensors], PLACES, PLACES, 1 << 20, check),
        ALL + 1 + ALL,
    ),
    "cutting tensors with gaps": (
        lambda check: cut([Pair(one, one) for one in GAPPED.tensors], PLACES, PLACES, 1 << 20, check),
        ALL + ALL + 1,
    ),
    "cutting a few into many pieces": (
        lambda check: cut([Pair(one, one) for one in rows(1, shape=(1 << 18,)).tensors], PLACES, PLACES, 16, check),
        1 + 1 + (1 << 14) // STEP + 1,
    ),
    "scratch": (lambda check: Scratch.for_tensors([(one, CPU) for one in GAPPED.tensors], check), ALL),
    "making tensors": (lambda check: tensors_of_copy(memory_for_all(SMALL, None), check), ALL),
    "making tensors of a model": (making_those_of_a_model, ALL),
}
PLACES = {0: Place(0, 0)}
SMALL = ModelLayout(rows(MANY).tensors, (StorageLayout(64 * MANY, "cpu"),))


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_over_a_layout_looks_whether_it_should_go_on(loop: str) -> None:
    """How often is counted, so that none of several loops is forgotten. Any look may end it."""
    run, looks = LOOPS[loop]
    whole = Deadline(1 << 60)
    with contextlib.suppress(tensorfork.LayoutMismatch):
        run(whole)
    assert (1 << 60) - whole.left == looks
    for times in (0, 1, looks // 2, looks - 1):
        with pytest.raises(Over):
            run(Deadline(times))


def test_looking_is_before_the_first_item_and_after_every_step() -> None:
    looks: list[int] = []
    seen: list[int] = []

    def items() -> Iterator[int]:
        for i in range(7):
            seen.append(i)
            yield i

    assert list(looking(items(), lambda: looks.append(len(seen)), 3)) == list(range(7))
    assert looks == [0, 3, 6]


# What is bounded whatever the deadline.


def test_a_grid_without_end_costs_no_more_than_the_limit() -> None:
    """Its points would be enumerated for ever, many of them twice."""
    for sizes in ([1 << 60] * 3, [2] * 63):
        one = TensorLayout("t", "uint8", tuple(sizes), tuple(1000 + i for i in range(len(sizes))), 0, 0)
        assert len(runs_of(one, 1024)) == 1025


def test_all_tensors_with_gaps_together_have_a_bounded_number_of_copies() -> None:
    pairs = [Pair(one, one) for one in rows(1000, shape=(500,), stride=(3,), at=lambda i: (0, 2000 * i)).tensors]
    plan = cut(pairs, PLACES, PLACES, 1 << 20)
    assert len(plan.copies) <= MAX_RUNS_OF_ALL
    assert len(plan.strided) == 1000
    assert Scratch.for_tensors([(pair.ours, CPU) for pair in pairs]).buffers[CPU].nbytes == 499 * 3 + 1
    few = cut(pairs[:100], PLACES, PLACES, 1 << 20)
    assert (len(few.copies), few.strided) == (100 * 500, ())


def test_a_name_made_for_a_pattern_of_ours_is_told_at_once() -> None:
    """With every * tried at every place, these would take for ever."""
    selection = Selection("*a*a*a*a*a*a*b.*a*a*a*a*a*c")
    assert not selection.selects("a" * 4000)
    assert not selection.selects("a." * 2000)
    assert not selection.selects("ab." * 1300)
    assert selection.selects("a" * 100 + "b." + "a" * 100 + "c.weight")


# The fork.


def model() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0)}


def test_a_deadline_that_is_past_is_an_error_that_names_the_layout(seed_of: Publish) -> None:
    import time
    from threading import Event

    cancel = Event()
    with connection.SeedConnection(seed_of(model()).address, time.monotonic() + SECONDS, cancel, stall=SECONDS) as seed:
        seed.check()
        seed._deadline = time.monotonic()
        with pytest.raises(PeerUnreachable, match="worked through the seed's layout, of 1 tensors in 1 storages"):
            seed.check()
        cancel.set()
        with pytest.raises(ForkCancelled):
            seed.check()


@pytest.mark.parametrize("times", range(6))
def test_a_fork_that_ends_for_that_gives_its_lease_back_and_the_model_stays_as_it_was(
    seed_of: Publish, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = seed_of(model())
    deadline = Deadline(times)

    def check(self: connection.SeedConnection) -> None:
        try:
            deadline()
        except Over:
            raise PeerUnreachable("the timeout passed") from None

    monkeypatch.setattr(connection.SeedConnection, "check", check)
    meta = torch.nn.Linear(3, 1, bias=False, device="meta")
    with pytest.raises(PeerUnreachable, match="the timeout passed"):
        tensorfork.fork_into(meta, seed.address, timeout=SECONDS, transport="zeromq")
    assert meta.weight.is_meta
    seed.close()
    assert seed.stats().running == 0
