"""`publish(snapshot=True)`: a copy of its own, so that whoever owns the model may do what he likes."""

import gc
import weakref

import pytest
import torch
from moving_models import MOVES, Attention, freed, values
from seed_leases import SECONDS
from torch import nn

import tensorfork


@pytest.mark.parametrize("snapshot", [True, "cpu", torch.device("cpu")])
def test_whatever_becomes_of_the_model_its_snapshot_stays(snapshot: bool | str | torch.device) -> None:
    model, ours = Attention(1.0), Attention(0.0)
    with tensorfork.publish(model, snapshot=snapshot) as seed:
        for move, _ in MOVES.values():
            move(model)
        freed(model)
        assert tensorfork.fork_into(ours, seed.address, timeout=SECONDS).verified
        assert set(values(ours).values()) == {1.0}


def test_ties_are_kept() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 8), "head": nn.Linear(8, 32, bias=False)})
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    with tensorfork.publish(model, snapshot=True) as seed:
        found = tensorfork.fork(seed.address, timeout=SECONDS)
        assert found["head.weight"] is found["embed.weight"]
        assert len(seed.layout.storages) == 1


def test_a_snapshot_does_not_keep_the_model() -> None:
    model = {"a": torch.ones(5)}
    with tensorfork.publish(model, snapshot=True):
        gone = weakref.ref(model["a"])
        del model
        gc.collect()
        assert gone() is None


def test_a_snapshot_does_not_change() -> None:
    with tensorfork.publish(Attention(1.0), snapshot=True) as seed:
        with pytest.raises(RuntimeError, match="publish the model again"), seed.updating():
            raise AssertionError("it is not entered")
        with pytest.raises(RuntimeError, match="publish the model again"):
            seed.rescan()
        seed.suspend()
        seed.resume()
        assert tensorfork.fork(seed.address, timeout=SECONDS)["scale"][0, 0] == 1.0


def test_a_model_on_meta_has_no_snapshot() -> None:
    with pytest.raises(tensorfork.UnsupportedTensor, match="meta"):
        tensorfork.publish({"a": torch.empty(5, device="meta")}, snapshot=True)
