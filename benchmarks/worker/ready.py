"""A second process of a model of transformers, from nothing to its first eight tokens; and the first one, which it
forks from, or whose files it loads.

The files are in the page cache: they have just been written. What differs between the methods is only how the weights
come.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker import models, real_models
from benchmarks.worker.state import Skip, WorkerState

TOKENS = 8
PROMPT = [1, 15, 27, 42]


def first(state: WorkerState, *, shape: str, folder: str, transport: str) -> dict[str, Any]:
    """Build the model, save it to the folder, publish it; its address, its bytes, and its first tokens."""
    import tensorfork

    models.build(state, shape=shape, placement="placed")
    state.model.save_pretrained(folder)
    state.seed = tensorfork.publish(state.model, transports=[transport])
    state.sync()
    return {"address": state.seed.address, "nbytes": state.nbytes, "tokens": _tokens(state, lambda _: None)}


def second(
    state: WorkerState, *, method: str, began: float, folder: str, address: str, transport: str
) -> dict[str, Any]:
    """Get the model by one method, and generate: the seconds of each phase since the process `began`, and the tokens.

    Args:
        state: of a process that has done nothing yet.
        method: "tensorfork", "from_pretrained" or "fastsafetensors".
        began: when it was started (`time.monotonic`).
        folder: has the model's files.
        address: of the first process's seed.
        transport: for the fork.
    """
    seconds: dict[str, float] = {}
    last = began

    def end(phase: str) -> None:
        nonlocal last
        state.sync()
        now = time.monotonic()
        seconds[phase], last = now - last, now

    _import(method)
    end("imports")
    if state.on_gpu:
        torch.cuda.set_device(state.device)
        torch.empty(1, device=state.device).fill_(1)
    end("device")
    if method == "tensorfork":
        _fork(state, folder, address, transport, end)
    elif method == "fastsafetensors":
        _fastsafetensors(state, folder, end)
    else:
        _from_pretrained(state, folder, end)
    tokens = _tokens(state, end)
    return {"seconds": seconds, "whole": last - began, "tokens": tokens}


def _import(method: str) -> None:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

        _ = AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # transformers imports what is named
        if method != "from_pretrained":
            __import__(method)
    except ImportError as error:
        raise Skip(f"{method}: {error}") from error


def _on_meta(folder: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return real_models.for_inference(model)


def _fork(state: WorkerState, folder: str, address: str, transport: str, end: Callable[[str], None]) -> None:
    import tensorfork

    state.model = _on_meta(folder)
    end("model")
    tensorfork.fork_into(state.model, address, device=state.device, transport=transport)
    end("weights")


def _from_pretrained(state: WorkerState, folder: str, end: Callable[[str], None]) -> None:
    from transformers import AutoModelForCausalLM

    end("model")  # it makes the model and loads the weights in one go
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=state.device)
    except (ImportError, ValueError):  # without accelerate there is no device_map
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(state.device)
    state.model = real_models.for_inference(model)
    end("weights")


def _fastsafetensors(state: WorkerState, folder: str, end: Callable[[str], None]) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    state.model = _on_meta(folder)
    end("model")
    loader = SafeTensorsFileLoader(SingleGroup(), state.device, nogds=True)
    loader.add_filenames({0: sorted(map(str, Path(folder).glob("*.safetensors")))})
    buffers = loader.copy_files_to_device()
    state.resources["fastsafetensors"] = loader, buffers  # the tensors lie in them
    tensors = {name: buffers.get_tensor(name) for name in buffers.key_to_rank_lidx}
    state.model.load_state_dict(tensors, strict=False, assign=True)
    state.model.requires_grad_(False)
    with torch.device(state.device):  # not in the file: it is computed from the configuration
        state.model.model.rotary_emb = type(state.model.model.rotary_emb)(state.model.config)
    end("weights")


@torch.inference_mode()
def _tokens(state: WorkerState, end: Callable[[str], None]) -> list[int]:
    """The tokens that the model generates greedily."""
    ids, cache, tokens = torch.tensor([PROMPT], device=state.device), None, list[int]()
    for _ in range(TOKENS):
        output = state.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
        if len(tokens) == 1:
            end("first token")
    end("further tokens")
    return tokens
