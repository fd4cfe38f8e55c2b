"""Forks into tensors that have memory: they stay the same objects, and nothing else changes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Tied, fingerprints, scramble, tensors_of, tied_many_runs
from torch import nn
from whole_forks import identities, to_meta

import tensorfork
from tensorfork import LayoutMismatch
from tensorfork.fork.strided import SCRATCH

pytestmark = pytest.mark.slow

SECONDS = 60.0


def default_dtype() -> Any:
    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return changed()


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "meta as the default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "saved tensors on the CPU": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_caller_s_mode_changes_nothing(seed_of: Any, mode: str) -> None:
    source, model, meta = Tied(), Tied(), to_meta(Tied())
    combs, more_combs = tied_many_runs(), tied_many_runs()
    scramble(model)
    scramble(more_combs)
    seed, comb_seed, before = seed_of(source), seed_of(combs), identities(model)
    with MODES[mode]():
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
        tensorfork.fork_into(meta, seed.address, timeout=SECONDS)
        tensorfork.fork_into(more_combs, comb_seed.address, timeout=SECONDS)
        copy = tensorfork.fork(seed.address, timeout=SECONDS)
    assert identities(model) == before
    for one in (model, meta, copy):
        assert fingerprints(one) == fingerprints(source)
    assert fingerprints(more_combs) == fingerprints(combs)
    assert not any(tensor.is_inference() for tensor in (*tensors_of(meta).values(), *copy.values()))
    assert all(parameter.requires_grad for parameter in meta.parameters())


@pytest.mark.parametrize("mode", ["inference mode", "no_grad", "meta as the default device"])
def test_the_caller_s_mode_changes_nothing_for_a_seed(mode: str) -> None:
    source = Tied()
    with MODES[mode](), tensorfork.publish(source) as seed:
        pass_by = tensorfork.fork(seed.address, timeout=SECONDS)
    assert fingerprints(pass_by) == fingerprints(source)


def test_tensors_made_under_inference_mode_are_filled_like_others(seed_of: Any) -> None:
    with torch.inference_mode():
        source, model = {"w": torch.ones(5)}, {"w": torch.zeros(5)}
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert torch.equal(model["w"], torch.ones(5))
    assert model["w"].is_inference()


def test_gradients_and_their_requirement_stay(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    model.head.requires_grad_(False)
    model.one.weight.grad = torch.full((8, 8), 3.0)
    gradient, before = model.one.weight.grad, identities(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert identities(model) == before
    assert model.one.weight.grad is gradient
    assert torch.equal(gradient, torch.full((8, 8), 3.0))


def test_ties_stay_ties(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    scramble(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        model.head.weight[0, 0] = 42.0
    assert model.embedding.weight[0, 0] == 42.0


def test_autograd_notices_that_a_tensor_was_filled(seed_of: Any) -> None:
    """What was computed from the old values must not be differentiated with the new ones."""
    model = nn.Linear(3, 3)
    loss = model(model(torch.ones(3))).sum()
    tensorfork.fork_into(model, seed_of(nn.Linear(3, 3)).address, timeout=SECONDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_that_a_tensor_may_have_been_filled_when_the_fork_failed(seed_of: Any) -> None:
    model = nn.Linear(3, 3)
    loss = model(model(torch.ones(3))).sum()

    def stop(now: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorfork.fork_into(model, seed_of(nn.Linear(3, 3)).address, timeout=SECONDS, progress=stop)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tie_of_the_seed_s_alone_is_copied_to_each(seed_of: Any) -> None:
    tied = torch.randn(40)
    model = {"a": torch.zeros(40), "b": torch.zeros(40)}
    tensorfork.fork_into(model, seed_of({"a": tied, "b": tied}).address, timeout=SECONDS)
    assert torch.equal(model["a"], tied)
    assert torch.equal(model["b"], tied)
    assert model["a"].data_ptr() != model["b"].data_ptr()


def test_a_tie_of_ours_alone_is_a_mismatch_and_nothing_is_touched(seed_of: Any) -> None:
    seed, tied = seed_of({"a": torch.zeros(40), "b": torch.zeros(40)}), torch.ones(40)
    with pytest.raises(LayoutMismatch, match="b: shares memory with a here"):
        tensorfork.fork_into({"a": tied, "b": tied}, seed.address, timeout=SECONDS)
    assert torch.equal(tied, torch.ones(40))
    assert seed.stats().granted == 0


def test_a_mismatch_lists_all_and_comes_before_a_lease(seed_of: Any) -> None:
    seed = seed_of(
        {"same": torch.zeros(2), "dtype": torch.zeros(2), "shape": torch.zeros(2, 3), "extra": torch.zeros(1)}
    )
    model = {
        "same": torch.ones(2),
        "dtype": torch.ones(2, dtype=torch.int32),
        "shape": torch.ones(3, 2),
        "lacking": torch.ones(1),
    }
    before = fingerprints(model)
    with pytest.raises(LayoutMismatch) as raised:
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert (raised.value.missing, raised.value.unexpected) == (("lacking",), ("extra",))
    assert [name for name, _ in raised.value.mismatched] == ["dtype", "shape"]
    assert fingerprints(model) == before
    assert seed.stats().granted == 0


def test_scratch_for_thousands_of_stretches_is_bounded(seed_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    empty = torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = empty(*size, **options)
        asked.append(tensor.nbytes)
        return tensor

    source, model = tied_many_runs(), tied_many_runs()
    scramble(model)
    seed = seed_of(source)
    monkeypatch.setattr(torch, "empty", watched)
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert max(asked) == SCRATCH
    monkeypatch.undo()
    assert fingerprints(model) == fingerprints(source)


def test_progress_goes_from_nothing_to_everything(seed_of: Any) -> None:
    """Whatever the way: straight into place, and through scratch."""
    seen: list[tuple[int, int]] = []
    report = tensorfork.fork_into(
        tied_many_runs(),
        seed_of(tied_many_runs()).address,
        timeout=SECONDS,
        progress=lambda now, all: seen.append((now, all)),
    )
    assert seen[0] == (0, report.nbytes)
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(seen)
