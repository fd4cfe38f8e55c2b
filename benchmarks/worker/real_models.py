"""Models of transformers, built as their users build them: from a configuration, on the device or on meta."""

import torch

from benchmarks.worker.state import Skip

PREFIX = "transformers-"


def is_one(shape: str) -> bool:
    """Whether this shape names such a model."""
    return shape.startswith(PREFIX)


def build(shape: str, device: str) -> torch.nn.Module:
    """Build one, in bfloat16, for inference. Raises `Skip` without transformers, and `ValueError` for another name."""
    kind, _, factor = shape.removeprefix(PREFIX).partition("*")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Skip(f"transformers: {error}") from error
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(kind, float(factor or 1)), dtype=torch.bfloat16)
    return for_inference(model)


def for_inference(model: torch.nn.Module) -> torch.nn.Module:
    """The model, in the state in which it generates."""
    return model.eval().requires_grad_(False)


def config(kind: str, scale: float = 1.0) -> object:
    """Its configuration: ``llama`` is Llama-3-8B (16.1 GB), ``mixtral`` has 8 experts in each of 32 layers (14 GB)."""
    from transformers import LlamaConfig, MixtralConfig

    layers = max(1, round(32 * scale))
    if kind == "llama":
        return LlamaConfig(
            hidden_size=4096,
            num_hidden_layers=layers,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=max(16, round(128_256 * scale)),
        )
    if kind == "mixtral":
        return MixtralConfig(
            hidden_size=2048,
            num_hidden_layers=layers,
            intermediate_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            vocab_size=32_000,
        )
    raise ValueError(f"{kind!r} is no real model; say llama or mixtral")
