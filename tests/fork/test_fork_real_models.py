"""Models as engines have them arrive whole: every byte, every tie, and what they compute, bit for bit."""

from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import pytest
import real_models
import torch
from processes import Child
from real_models import build, build_on_meta, hash_of, hashes, run
from torch import nn

import tensorfork
from tensorfork.model.walk import walk

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
SECONDS = 30.0
TORCHAO = find_spec("torchao") is not None
KINDS = [kind for kind in real_models.BUILDERS if TORCHAO or kind not in ("int8", "int4")]
with_torchao = pytest.mark.skipif(not TORCHAO, reason="needs torchao")


def publish(pipe: Connection, kinds: list[str]) -> None:
    """Publish them all, and say of each where it is, what it computes, and what it holds."""
    models = {kind: build(kind, 0) for kind in kinds}
    seeds = {kind: tensorfork.publish(model, transports=["zeromq"]) for kind, model in models.items()}
    pipe.send({kind: (seeds[kind].address, hash_of(run(kind, model)), hashes(model)) for kind, model in models.items()})
    pipe.recv()
    for seed in seeds.values():
        seed.close()


@pytest.fixture(scope="module")
def published() -> Iterator[dict[str, Any]]:
    with Child(publish, KINDS) as child:
        yield child.recv()
        child.send("done")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["in place", "meta"])
def test_a_model_of_another_process_computes_the_same_bit_for_bit(
    published: dict[str, Any], kind: str, form: str
) -> None:
    address, output, contents = published[kind]
    model = build_on_meta(kind) if form == "meta" else build(kind, 1)
    objects = {name: id(tensor) for name, tensor in walk(model).tensors.items()}
    places = {name: tensor.data_ptr() for name, tensor in walk(model).tensors.items() if not tensor.is_meta}
    if form == "in place":
        assert hash_of(run(kind, model)) != output
    report = tensorfork.fork_into(model, address, timeout=SECONDS, device="cpu")
    assert report.tensors == len(contents)
    assert report.values is not None
    assert list(map(str, report.values.different)) == []
    assert hashes(model) == contents
    assert {name: id(tensor) for name, tensor in walk(model).tensors.items()} == objects
    for name, tensor in walk(model).tensors.items():
        assert places.get(name, tensor.data_ptr()) == tensor.data_ptr()
    assert hash_of(run(kind, model)) == output


@pytest.mark.parametrize("kind", ["gpt2", "bert", "whisper"])
@pytest.mark.parametrize("form", ["in place", "meta"])
def test_tied_embeddings_stay_tied(published: dict[str, Any], kind: str, form: str) -> None:
    model = build_on_meta(kind) if form == "meta" else build(kind, 1)
    tensorfork.fork_into(model, published[kind][0], timeout=SECONDS, device="cpu")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_buffers_that_no_checkpoint_has_arrive_too(published: dict[str, Any]) -> None:
    """A model built on the meta device has none of them, and no file would bring them."""
    for kind in ("llama", "gpt2", "bert"):
        model = build_on_meta(kind)
        fixed = [name for name, _ in model.named_buffers()]
        assert fixed
        assert not set(fixed) & set(model.state_dict())
        tensorfork.fork_into(model, published[kind][0], timeout=SECONDS, device="cpu")
        arrived = {name: hash_of(buffer) for name, buffer in model.named_buffers()}
        assert arrived.items() <= published[kind][2].items()


def test_what_was_absorbed_is_found_and_what_it_was_absorbed_from_is_gone(published: dict[str, Any]) -> None:
    names = set(published["mla"][2])
    assert {"0.w_kc", "0.w_vc", "1.w_kc", "1.w_vc"} <= names
    assert not any("kv_b" in name for name in names)


@with_torchao
def test_scales_are_found_where_the_quantization_keeps_them(published: dict[str, Any]) -> None:
    assert {"0.quant_method.scales['weight']", "0.quant_method.quantized", "0.weight"} <= set(published["fp8"][2])
    assert {"0.weight.qdata", "0.weight.scale"} <= set(published["int8"][2])
    assert {"0.weight.qdata", "0.weight.scale_and_zero"} <= set(published["int4"][2])


@with_torchao
def test_quantized_weights_are_the_same_parameters_as_before(published: dict[str, Any]) -> None:
    model = build_on_meta("int8")
    weight = model[0].weight
    tensorfork.fork_into(model, published["int8"][0], timeout=SECONDS, device="cpu")
    assert model[0].weight is weight
    assert isinstance(weight, nn.Parameter)
    assert type(weight).__name__ == "Int8Tensor"
    assert (weight.device.type, weight.qdata.device.type) == ("cpu", "cpu")


# The two sides at different moments of their lives.


def before_and_after() -> list[Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)

    quantized = plain()
    quantize_(quantized, Int8WeightOnlyConfig())
    return [
        (real_models.Absorbed(), real_models.Absorbed().absorb(), {"w_kc", "w_vc"}, {"kv_b.weight"}),
        (plain(), quantized, {f"{i}.weight.{part}" for i in (0, 1) for part in ("qdata", "scale", "zero_point")},
         {"0.weight", "1.weight"}),
    ]  # fmt: skip


@with_torchao
@pytest.mark.parametrize("which", [0, 1], ids=["absorbed", "quantized"])
def test_a_model_before_post_processing_is_no_match_for_one_after_it(which: int) -> None:
    before, after, only_after, only_before = before_and_after()[which]
    for seed_model, model, missing, unexpected in (
        (before, after, only_after, only_before),
        (after, before, only_before, only_after),
    ):
        kept = hashes(model)
        with tensorfork.publish(seed_model) as seed, pytest.raises(tensorfork.LayoutMismatch) as caught:
            tensorfork.fork_into(model, seed.address, timeout=SECONDS)
        assert set(caught.value.missing) == missing
        assert set(caught.value.unexpected) == unexpected
        assert hashes(model) == kept


def test_a_cache_that_one_side_alone_has_filled_is_named(published: dict[str, Any]) -> None:
    """What is made at the first forward pass belongs to the moment as well."""
    model = build("llama", 1)
    model.model.mask_cache = {"9": torch.ones(9, 9)}
    with pytest.raises(tensorfork.LayoutMismatch) as caught:
        tensorfork.fork_into(model, published["llama"][0], timeout=SECONDS)
    assert caught.value.missing == ("model.mask_cache['9']",)
    tensorfork.fork_into(model, published["llama"][0], timeout=SECONDS, exclude="model.mask_cache")
    assert hash_of(run("llama", model)) == published["llama"][1]
