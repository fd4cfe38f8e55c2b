"""A published model of which much is empty is warned of: its weights lie in handles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from real_models import build
from torch import nn

import tensorfork
from tensorfork.model.emptied import hollow_layers
from tensorfork.model.walk import walk


def emptied(model: nn.Module, *, which: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """As vLLM leaves a model on a CPU: each layer's weight is in a handle, and an empty parameter in its place."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and which(name):
            layer.handle, layer.weight = object(), nn.Parameter(torch.empty(0), requires_grad=False)
    return model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)


def blocks(count: int = 4) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


def warned(caplog: pytest.LogCaptureFixture, model: Any) -> str:
    with tensorfork.publish(model, transports=["zeromq"]):
        pass
    return "".join(record.getMessage() for record in caplog.records if record.name == "tensorfork")


def test_a_model_whose_weights_lie_in_handles_is_warned_of_by_number_and_name(caplog: pytest.LogCaptureFixture) -> None:
    said = warned(caplog, emptied(blocks()))
    assert said.startswith("8 of 12 layers")
    assert "0.up.weight, 0.down.weight, 1.up.weight:" in said


def test_it_is_said_too_when_the_weights_go_while_the_model_is_published(caplog: pytest.LogCaptureFixture) -> None:
    model = blocks()
    with tensorfork.publish(model, transports=["zeromq"]) as seed:
        assert not caplog.records
        with seed.updating():
            emptied(model)
        assert "8 of 12 layers" in caplog.text


def marlin() -> nn.Module:
    """A layer of GPTQ's: half of its parameters are not used, and the weight is there."""
    layer = nn.Module()
    layer.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
    for name in ("qzeros", "g_idx", "g_idx_sort_indices"):
        setattr(layer, name, nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False))
    return layer


def with_empty_buffers() -> nn.Module:
    model = blocks()
    for block in model:
        block.cache = nn.Module()
        block.cache.register_buffer("state", torch.empty(0))
    return model


@pytest.mark.parametrize(
    "make",
    [
        blocks,
        with_empty_buffers,
        lambda: nn.Sequential(*(marlin() for _ in range(4))),
        lambda: emptied(blocks(), which=lambda name: name == "0.up"),
        lambda: emptied(blocks(40), which=lambda name: name.startswith("0.")),
        lambda: {"a": torch.zeros(2, 2), "b": torch.empty(0)},
        nn.Module,
    ],
)
def test_ordinary_models_are_not_warned_of(caplog: pytest.LogCaptureFixture, make: Callable[[], Any]) -> None:
    assert warned(caplog, make()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral", "whisper", "mla", "fp8"])
def test_no_layer_of_a_real_model_is_hollow(kind: str) -> None:
    pytest.importorskip("transformers")
    assert hollow_layers(walk(build(kind, 0)).tensors)[0] == []
