"""Models of given shapes, filled with numbers that mean nothing.

A shape is written ``llama`` (Llama-3-8B: 291 tensors, 16.1 GB), ``experts`` (10,000 tensors of 1.5 MB, 15.7 GB), either
with a factor (``llama*0.1``), ``16GB/1`` (bytes in all / number of tensors), or ``3000x64KiB`` (number x bytes of
each). All are bfloat16. ``transformers-llama`` and ``transformers-mixtral`` are models of transformers, built as their
users build them (`benchmarks.worker.real_models`); they too take a factor.
"""

import math
import re
from collections.abc import Iterator

import torch

from benchmarks.worker import real_models
from benchmarks.worker.state import WorkerState

ALIGNMENT = 512
SUM_CHUNK = 1 << 28
"""Words that are summed in one call, for which torch makes a 64-bit copy of them."""
UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
Shapes = list[tuple[str, tuple[int, ...]]]
DTYPE = torch.bfloat16


def shapes(shape: str) -> Shapes:
    """Names and shapes of a model's tensors. Raises `ValueError`."""
    kind, _, factor = shape.partition("*")
    scale = float(factor or 1)
    if kind == "llama":
        return _llama(scale)
    if kind == "experts":
        return [(f"experts.{i}.weight", (768, 1024)) for i in range(max(1, round(10_000 * scale)))]
    if found := re.fullmatch(r"(\d+)x([\d.]+\w*)", shape):
        return _equal_sizes(int(found[1]), _nbytes(found[2]))
    if found := re.fullmatch(r"([\d.]+\w*)/(\d+)", shape):
        return _equal_sizes(int(found[2]), _nbytes(found[1]) // int(found[2]))
    raise ValueError(f"{shape!r} is no shape; say llama, experts, llama*0.1, 16GB/1 or 3000x64KiB")


def build(state: WorkerState, *, shape: str, placement: str, fill: bool = False) -> dict[str, float]:
    """Make the worker's model, and release the one that it had.

    Args:
        state: the worker's state, which gets the model.
        shape: see above.
        placement: "placed": each tensor where the allocator puts it; "arena": all in one allocation (not for real
            models); "meta": on the meta device.
        fill: write bytes that differ from tensor to tensor.
    """
    release(state)
    if real_models.is_one(shape):
        state.model = real_models.build(shape, "meta" if placement == "meta" else state.device)
    else:
        named_shapes = shapes(shape)
        state.model = _tree(named_shapes, list(_tensors(named_shapes, state.device, placement)))
    state.tensors = {**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}
    if fill:
        _fill(state)
    state.sync()
    return {"tensors": len(state.tensors), "nbytes": state.nbytes}


def release(state: WorkerState) -> None:
    """Close the seed and free the model's memory."""
    if state.seed is not None:
        state.seed.close()
    state.model, state.seed, state.tensors = None, None, {}
    if state.on_gpu:
        torch.cuda.empty_cache()


def zero(state: WorkerState) -> None:
    """Overwrite every tensor with zeros."""
    for tensor in state.tensors.values():
        tensor.zero_()
    state.sync()


def sums(state: WorkerState) -> list[int]:
    """The sum of every tensor's 16-bit words, which shows that the right bytes arrived in the right tensor."""
    found = [
        torch.stack([part.sum() for part in tensor.detach().view(torch.int16).reshape(-1).split(SUM_CHUNK)]).sum()
        for tensor in state.tensors.values()
    ]
    return [int(value) for value in torch.stack(found).cpu()]


def _llama(scale: float) -> Shapes:
    vocabulary = max(16, round(128_256 * scale))
    found: Shapes = [("model.embed_tokens.weight", (vocabulary, 4096))]
    for layer in range(max(1, round(32 * scale))):
        sizes = {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
            "input_layernorm": (4096,),
            "post_attention_layernorm": (4096,),
        }
        found += [(f"model.layers.{layer}.{name}.weight", size) for name, size in sizes.items()]
    return [*found, ("model.norm.weight", (4096,)), ("lm_head.weight", (vocabulary, 4096))]


def _equal_sizes(count: int, nbytes: int) -> Shapes:
    return [(f"blocks.{i}.weight", (max(1, nbytes // DTYPE.itemsize),)) for i in range(count)]


def _nbytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+)(\w*)", text)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no size; say 16GB or 64KiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _tensors(named_shapes: Shapes, device: str, placement: str) -> Iterator[torch.Tensor]:
    if placement != "arena":
        at = "meta" if placement == "meta" else device
        yield from (torch.empty(size, dtype=DTYPE, device=at) for _, size in named_shapes)
        return
    lengths = [math.prod(size) * DTYPE.itemsize for _, size in named_shapes]
    arena = torch.empty(sum(-(-n // ALIGNMENT) * ALIGNMENT for n in lengths), dtype=torch.uint8, device=device)
    start = 0
    for (_, size), nbytes in zip(named_shapes, lengths, strict=True):
        yield arena[start : start + nbytes].view(DTYPE).view(size)
        start += -(-nbytes // ALIGNMENT) * ALIGNMENT


def _tree(named_shapes: Shapes, tensors: list[torch.Tensor]) -> torch.nn.Module:
    """A tree of modules, with one for each part of a name before its last dot."""
    root = torch.nn.Module()
    for (name, _), tensor in zip(named_shapes, tensors, strict=True):
        *path, last = name.split(".")
        module = root
        for step in path:
            if step not in module._modules:
                module.add_module(step, torch.nn.Module())
            module = module._modules[step]
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def _fill(state: WorkerState) -> None:
    """Copy one block of random words into each tensor, from an offset of its own: fast even for gigabytes on a CPU."""
    torch.manual_seed(1)
    block = torch.randint(-30_000, 30_000, ((8 << 20) + 4096,), dtype=torch.int16, device=state.device)
    for number, tensor in enumerate(state.tensors.values()):
        flat = tensor.detach().view(torch.int16).view(-1)
        shift = number * 7 % 4096
        for piece in flat.split(8 << 20):
            piece.copy_(block[shift : shift + piece.numel()])
