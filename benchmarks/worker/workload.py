"""The seed's own work while it is forked: short steps, one after another, of which each is waited for."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.worker.state import Skip, WorkerState

MAX_TOKENS = 256
"""Tokens after which the generation starts with an empty cache again."""


def prepare(state: WorkerState, *, load: str) -> None:
    """Prepare the steps of a load: "gemm", "llama" or "loop". The model of "llama" becomes the worker's."""
    step = {"gemm": _gemm, "llama": _llama, "loop": _loop}[load](state)
    for _ in range(20):
        step()
    state.resources["step"] = step


def run(state: WorkerState, *, seconds: float) -> list[tuple[float, float]]:
    """Take steps for so long; for each, when it began (`time.monotonic`) and how many ms it took."""
    step, steps = state.resources["step"], list[tuple[float, float]]()
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        step()
        steps.append((start, round(1e3 * (time.monotonic() - start), 4)))
    return steps


def _gemm(state: WorkerState) -> Callable[[], None]:
    """A captured CUDA graph like that of a decoding step: 40 products of 64 x 8192 x 8192."""
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

    def step(used: Sequence[torch.Tensor] = (x, weight, y)) -> None:  # a graph keeps no reference to its tensors
        graph.replay()
        torch.cuda.current_stream().synchronize()

    return step


def _llama(state: WorkerState) -> Callable[[], None]:
    """A transformers Llama with random weights that generates greedily, one token a step."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skip(f"transformers: {error}") from error
    hidden, layers, intermediate = (2048, 16, 8192) if state.on_gpu else (256, 4, 688)
    if not state.on_gpu:
        torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=32_000,
    )
    torch.manual_seed(1)
    with torch.device(state.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if state.on_gpu else torch.float32).eval()
    state.model = model.requires_grad_(False)
    state.tensors = dict(model.named_parameters())
    generation: dict[str, Any] = {
        "cache": None,
        "token": torch.ones(1, 1, dtype=torch.long, device=state.device),
        "n": 0,
    }

    @torch.inference_mode()
    def step() -> None:
        if generation["n"] % MAX_TOKENS == 0:
            generation["cache"] = None
        output = model(input_ids=generation["token"], past_key_values=generation["cache"], use_cache=True)
        generation["cache"], generation["token"] = output.past_key_values, output.logits[:, -1:].argmax(-1)
        generation["n"] += 1
        state.sync()

    return step


def _loop(state: WorkerState) -> Callable[[], None]:
    """Python and small products on the CPU, which take about 2 ms when nothing else runs."""
    torch.set_num_threads(1)
    x = torch.randn(192, 192)

    def work(times: int) -> None:
        y = x
        for _ in range(times):
            y = torch.tanh(y @ x)

    def timed(times: int) -> float:
        start = time.perf_counter()
        work(times)
        return time.perf_counter() - start

    times = max(1, round(10 * 0.002 / min(timed(10) for _ in range(50))))
    return lambda: work(times)
