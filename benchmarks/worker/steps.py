"""What a seed does all day: small steps, one after another, each of which somebody waits for."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.worker.state import Skip, State

CONTEXT = 256
"""Tokens after which the generation begins anew."""


def prepare(state: State, *, load: str) -> None:
    """Get a load ready: "gemm", "llama" or "loop". The model of "llama" becomes the worker's."""
    step = {"gemm": _gemm, "llama": _llama, "loop": _loop}[load](state)
    for _ in range(20):
        step()
    state.kept["step"] = step


def run(state: State, *, seconds: float) -> list[tuple[float, float]]:
    """Step after step, each waited for; when each began (`time.monotonic`), and how long it took, in ms."""
    step, found = state.kept["step"], list[tuple[float, float]]()
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        step()
        found.append((began, round(1e3 * (time.monotonic() - began), 4)))
    return found


def _gemm(state: State) -> Callable[[], None]:
    """A captured graph like a decoding step's: 40 products of 64 x 8192 x 8192."""
    x = torch.randn(64, 8192, device=state.device, dtype=torch.bfloat16)
    weight = torch.randn(8192, 8192, device=state.device, dtype=torch.bfloat16)
    for _ in range(3):
        x @ weight
    state.sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(40):
            y = (y @ weight) * 0.01

    def step(kept: Sequence[torch.Tensor] = (x, weight, y)) -> None:  # what a graph reads it does not keep alive
        graph.replay()
        torch.cuda.current_stream().synchronize()

    return step


def _llama(state: State) -> Callable[[], None]:
    """A transformers Llama with random weights, generating greedily, one token a step."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skip(f"transformers: {error}") from error
    sizes = (2048, 16, 8192) if state.on_gpu else (256, 4, 688)
    hidden, layers, inner = sizes
    if not state.on_gpu:
        torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=32_000,
    )
    torch.manual_seed(1)
    with torch.device(state.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if state.on_gpu else torch.float32).eval()
    state.model = model.requires_grad_(False)
    state.tensors = dict(model.named_parameters())
    at: dict[str, Any] = {"cache": None, "token": torch.ones(1, 1, dtype=torch.long, device=state.device), "n": 0}

    @torch.inference_mode()
    def step() -> None:
        if at["n"] % CONTEXT == 0:
            at["cache"] = None
        said = model(input_ids=at["token"], past_key_values=at["cache"], use_cache=True)
        at["cache"], at["token"] = said.past_key_values, said.logits[:, -1:].argmax(-1)
        at["n"] += 1
        state.sync()

    return step


def _loop(state: State) -> Callable[[], None]:
    """Python and small products on the CPU, about 2 ms when nothing else runs."""
    torch.set_num_threads(1)
    x = torch.randn(192, 192)

    def work(times: int) -> None:
        y = x
        for _ in range(times):
            y = torch.tanh(y @ x)

    def timed(times: int) -> float:
        began = time.perf_counter()
        work(times)
        return time.perf_counter() - began

    times = max(1, round(10 * 0.002 / min(timed(10) for _ in range(50))))
    return lambda: work(times)
