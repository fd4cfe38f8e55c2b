"""Models as engines have them: transformers' architectures, small and random, and modules after post-processing.

Each is a function of a random seed, and can be built on the meta device. `run` computes with a model.
"""

import ctypes
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tensorfork.model.walk import walk


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            dtype=torch.bfloat16,
        )
    ).to(torch.bfloat16)


def gpt2() -> nn.Module:
    """Tied embeddings, transposed weights (Conv1D), and the mask buffers that it had for years."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    for block in model.transformer.h:
        block.attn.register_buffer("bias", torch.ones(32, 32, dtype=torch.bool).tril()[None, None], persistent=False)
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    """Experts in one tensor of three dimensions, and a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def whisper() -> nn.Module:
    """Two stacks, convolutions, fixed sinusoids."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=99, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


class Absorbed(nn.Module):
    """Attention with latent keys and values. `absorb` turns its up-projection, a parameter, into two plain attributes
    with their dimensions exchanged, and the parameter is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.latent, self.nope, self.value = 4, 8, 6, 5
        self.q = nn.Linear(32, self.heads * self.nope, bias=False)
        self.kv_a = nn.Linear(32, self.latent, bias=False)
        self.kv_b = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o = nn.Linear(self.heads * self.value, 32, bias=False)

    @torch.no_grad()
    def absorb(self) -> "Absorbed":
        up = self.kv_b.weight.view(self.heads, self.nope + self.value, self.latent)
        w_kc, w_vc = up.split([self.nope, self.value], dim=1)
        self.w_kc = w_kc.transpose(1, 2).contiguous().transpose(1, 2)
        self.w_vc = w_vc.contiguous().transpose(1, 2)
        del self.kv_b
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent = self.kv_a(x)
        q = self.q(x).unflatten(-1, (self.heads, self.nope)).transpose(1, 2)
        scores = torch.matmul(q @ self.w_kc, latent.transpose(1, 2).unsqueeze(1)).softmax(-1)
        out = torch.matmul(scores @ latent.unsqueeze(1), self.w_vc)
        return self.o(out.transpose(1, 2).flatten(2))


def mla() -> nn.Module:
    return nn.Sequential(Absorbed().absorb(), Absorbed().absorb())


class PerChannel:
    """A quantization method that keeps a layer's tensors in an object of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        limit = torch.finfo(torch.float8_e4m3fn).max
        self.scales = {"weight": weight.abs().amax(1, keepdim=True) / limit}
        self.quantized = (weight / self.scales["weight"]).to(torch.float8_e4m3fn)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ (layer.weight.to(torch.float32) * self.scales["weight"].t())


class FP8Linear(nn.Module):
    """Weights as a kernel wants them: eight bits, column by column, one scale a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.quant_method = PerChannel(nn.Linear(32, 32, bias=False).weight.detach())
        self.weight = nn.Parameter(self.quant_method.quantized.t(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


def fp8() -> nn.Module:
    return nn.Sequential(FP8Linear(), nn.LayerNorm(32), FP8Linear())


def int8() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def int4() -> nn.Module:
    """Packed by a kernel: the stored tensor has another shape than the weight."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(torch.bfloat16)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder for builder in (llama, gpt2, bert, mixtral, whisper, mla, fp8, int8, int4)
}
NOT_ON_META = frozenset({"int4"})
"""Its packing kernel knows the CPU only; the packed model is moved there instead."""


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().eval()


def build_on_meta(name: str) -> nn.Module:
    if name in NOT_ON_META:
        return build(name, 0).to("meta")
    with torch.device("meta"):
        return BUILDERS[name]().eval()


@torch.no_grad()
def run(name: str, model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 99, (2, 9), generator=draw)
    if name == "whisper":
        return model(input_features=torch.randn(2, 8, 40, generator=draw), decoder_input_ids=tokens).logits
    if name in ("mla", "fp8", "int8", "int4"):
        x = torch.randn(2, 5, 32, generator=draw)
        return model(x.to(torch.bfloat16) if name.startswith("int") else x)
    return model(tokens).logits


def hash_of(tensor: torch.Tensor) -> str:
    """A hash of the elements' bytes that is independent of tensorfork's digests."""
    dense = tensor.detach().contiguous()
    return hashlib.blake2b(ctypes.string_at(dense.data_ptr(), dense.nbytes), digest_size=16).hexdigest()


def hashes(model: Any) -> dict[str, str]:
    return {name: hash_of(tensor) for name, tensor in walk(model).tensors.items()}
