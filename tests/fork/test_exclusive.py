"""Two forks of one process into one model at once: the second is refused."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import fingerprints

import tensorfork
from tensorfork import api
from tensorfork.fork import exclusive
from tensorfork.model.describe import describe

pytestmark = pytest.mark.slow

SECONDS = 60.0


def layers(device: str = "cpu", nbytes: int = 4000) -> dict[str, torch.Tensor]:
    return {name: torch.full((nbytes // 4,), float(i), device=device) for i, name in enumerate(("a.w", "b.w"), 1)}


def in_one_allocation(nbytes: int = 4000) -> dict[str, torch.Tensor]:
    """As a fork leaves them that made them."""
    buffer = torch.zeros(nbytes // 2)
    return dict(zip(("a.w", "b.w"), buffer.split(nbytes // 4), strict=True))


MODELS = {"each by itself": layers, "in one allocation": in_one_allocation, "meta": lambda: layers("meta")}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("part_first", [False, True], ids=["the whole first", "a part first"])
def test_a_fork_into_what_is_being_filled_is_refused(
    seed_of: Callable[[Any], tensorfork.Seed], make: Callable[[], dict[str, torch.Tensor]], part_first: bool
) -> None:
    model, refused = make(), list[str]()
    part = {"again": model["b.w"]}
    whole, other = seed_of(layers()), seed_of({"again": torch.full((1000,), 9.0)})
    first, second = (part, other), (model, whole)
    if not part_first:
        first, second = second, first

    def fork(into: Any, seed: tensorfork.Seed, progress: Any = None) -> None:
        tensorfork.fork_into(into, seed.address, device="cpu", transport="zeromq", timeout=SECONDS, progress=progress)

    def meanwhile(_done: int, _total: int) -> None:
        with pytest.raises(ValueError, match="under way") as caught:
            fork(*second)
        refused.append(str(caught.value))

    fork(*first, meanwhile)
    assert refused
    assert fingerprints(first[0]) == fingerprints({"again": torch.full((1000,), 9.0)} if part_first else layers())
    fork(*second)  # it is over


def test_what_two_forks_have_in_common_is_bytes_and_not_pages(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    model, done = in_one_allocation(nbytes=64), list[int]()
    model["empty"] = torch.empty(0)
    seed = seed_of({**layers(nbytes=64), "empty": torch.empty(0)})

    def meanwhile(*_: int) -> None:
        part = {"b.w": model["b.w"], "empty": torch.empty(0)}
        done.append(tensorfork.fork_into(part, seed.address, include=["b", "empty"], timeout=SECONDS).tensors)

    tensorfork.fork_into(model, seed.address, include=["a", "empty"], timeout=SECONDS, progress=meanwhile)
    assert done[0] == 2
    assert fingerprints(model) == fingerprints({**layers(nbytes=64), "empty": torch.empty(0)})


def test_a_model_that_was_filled_after_it_was_looked_at_is_refused(
    seed_of: Callable[[Any], tensorfork.Seed], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, model, alone = seed_of(layers()), layers("meta"), exclusive.exclusive_fill

    def late(ours: Any) -> Any:
        monkeypatch.setattr(api, "exclusive_fill", alone)
        tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
        return alone(ours)

    monkeypatch.setattr(api, "exclusive_fill", late)
    with pytest.raises(ValueError, match="fork again"):
        tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(layers())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_whoever_is_not_refused_fills_the_model(
    seed_of: Callable[[Any], tensorfork.Seed], make: Callable[[], dict[str, torch.Tensor]]
) -> None:
    seed, model, ended = seed_of(layers()), make(), list[str]()
    together = threading.Barrier(4)

    def fork() -> None:
        together.wait(SECONDS)
        try:
            tensorfork.fork_into(model, seed.address, device="cpu", transport="zeromq", timeout=SECONDS)
            ended.append("filled")
        except ValueError:
            ended.append("refused")

    threads = [threading.Thread(target=fork) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ended) == together.parties
    assert "filled" in ended
    assert fingerprints(model) == fingerprints(layers())
    gc.collect()
    assert not exclusive._in_progress


def test_a_fork_that_ends_while_another_is_looked_at_disturbs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    surveys = [describe(layers()) for _ in range(4)]
    overlap, looks = exclusive._overlap, list[bool]()
    with contextlib.ExitStack() as others:
        for ours in surveys[1:]:
            others.enter_context(exclusive.exclusive_fill(ours))

        def ending(one: Any, other: Any) -> bool:
            others.close()
            looks.append(overlap(one, other))
            return looks[-1]

        monkeypatch.setattr(exclusive, "_overlap", ending)
        with exclusive.exclusive_fill(surveys[0]):
            assert looks == [False] * 3
    assert not exclusive._in_progress


def test_models_with_tied_tensors_are_filled_at_once(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    def tied(device: str) -> dict[str, torch.Tensor]:
        both = torch.full((100,), 3.0, device=device)
        return {"one": both, "other": both, "part": both[10:20]}

    seed, done = seed_of(tied("cpu")), list[int]()
    models = [{name: torch.zeros_like(t) for name, t in tied("cpu").items()} for _ in range(2)]
    for model in models:
        model["other"], model["part"] = model["one"], model["one"][10:20]

    def meanwhile(*_: int) -> None:
        done.append(tensorfork.fork_into(models[1], seed.address, timeout=SECONDS).tensors)

    tensorfork.fork_into(models[0], seed.address, timeout=SECONDS, progress=meanwhile)
    assert done
    assert all(fingerprints(model) == fingerprints(tied("cpu")) for model in models)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests leave torch's threads
def test_a_child_process_may_fill_what_its_parent_was_filling() -> None:
    ours = describe(layers())
    with exclusive.exclusive_fill(ours), exclusive._lock:
        if not (child := os.fork()):
            try:
                with exclusive.exclusive_fill(ours):
                    os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_parts_of_a_model_are_filled_at_once(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    seed, model, filled = seed_of(layers()), layers("meta"), list[int]()

    def meanwhile(done: int, _total: int) -> None:
        if not done:
            report = tensorfork.fork_into(model, seed.address, device="cpu", include="b", timeout=SECONDS)
            filled.append(report.tensors)

    tensorfork.fork_into(model, seed.address, device="cpu", include="a", timeout=SECONDS, progress=meanwhile)
    assert filled == [1]
    assert fingerprints(model) == fingerprints(layers())


def test_a_model_whose_fork_failed_may_be_forked_into_again(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    seed, model = seed_of(layers()), layers("meta")

    def fail(done: int, _total: int) -> None:
        if done:
            raise RuntimeError("of the caller's")

    with pytest.raises(RuntimeError, match="of the caller's"):
        tensorfork.fork_into(model, seed.address, device="cpu", transport="gloo", timeout=SECONDS, progress=fail)
    tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    assert fingerprints(model) == fingerprints(layers())
