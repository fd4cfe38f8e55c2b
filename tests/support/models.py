"""Generated models, with each kind of tensor that a model may hold.

Every function here makes the same model each time, in every process. `scramble` changes all bytes of a model;
`fingerprints` tells whether two models hold the same.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tensorfork.model.walk import walk

Model = nn.Module | dict[str, torch.Tensor]

DTYPES = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str)
DTYPES = [dtype for dtype in DTYPES if not str(dtype).startswith(("torch.qint", "torch.quint", "torch.complex32"))]
"""All that torch has; quantized tensors cannot be forked, and merely making a complex32 is a warning."""


def noise(nbytes: int, seed: int) -> torch.Tensor:
    """Random bytes, the same for the same seed."""
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(max(nbytes, 1))), dtype=torch.uint8)[
        :nbytes
    ].clone()


def made(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of any dtype over random bytes."""
    memory = noise(math.prod(shape) * dtype.itemsize, seed)
    tensor = torch.empty(0, dtype=dtype)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tensor.set_(memory.untyped_storage(), 0, shape, strides)


def plain() -> Model:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, dtype=torch.bfloat16))


class Tied(nn.Module):
    """An embedding that is the head's weight too; a buffer and a parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.bias = self.one.bias
        self.register_buffer("table", torch.arange(9.0))
        self.one.register_buffer("table", self.table)


class Views(nn.Module):
    """Parameters and buffers that are views into shared storages: slices, rows, a whole beside its parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        fused = torch.randn(24, 16)
        self.qkv = nn.Parameter(fused)
        self.q, self.k, self.v = (nn.Parameter(part) for part in fused.split(8))
        cache = torch.randn(1000)
        self.register_buffer("early", cache[100:200])
        self.register_buffer("late", cache[700:705])
        self.register_buffer("overlapping", cache[150:300])
        self.register_buffer("bytes", cache[700:705].view(torch.uint8))


def strided() -> Model:
    torch.manual_seed(4)
    base = torch.randn(12, 20)
    return {
        "transposed": torch.randn(6, 9).t(),
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "columns": base[:, 3:11],
        "steps": base[::3, ::2],
        "diagonal": torch.randn(7, 7).diagonal(),
        "row of a transposed": torch.randn(5, 8).t()[2],
        "sizes of one": torch.randn(4, 1, 3)[::2],
        "bfloat16 steps": torch.randn(9, 9, dtype=torch.bfloat16)[1::2, 2::3],
        "complex parts": torch.randn(5, 5, dtype=torch.complex64).real,
    }


class Buffers(nn.Module):
    """Persistent and not; of no dimension; None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.BatchNorm1d(4)
        self.norm.num_batches_tracked.fill_(123)
        self.register_buffer("positions", torch.arange(33), persistent=False)
        self.register_buffer("mask", torch.rand(5, 5) > 0.5, persistent=False)
        self.register_buffer("scale", torch.tensor(0.125))
        self.register_buffer("nothing", None)
        self.register_parameter("absent", None)


def small() -> Model:
    """Without elements, without dimensions, and in between."""
    return {
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 7, dtype=torch.int8),
        "empty columns": torch.empty(7, 0, 3),
        "scalar": torch.tensor(2.5),
        "whole number": torch.tensor(7, dtype=torch.uint8),
        "truth": torch.tensor(True),
        "one": torch.ones(1, 1, 1),
        "slice of nothing": torch.ones(5)[3:3],
    }


def nothing() -> Model:
    return {}


def dtypes() -> Model:
    """Every dtype, dense, odd in length, and with gaps."""
    model: dict[str, torch.Tensor] = {}
    for i, dtype in enumerate(DTYPES):
        model[f"{dtype} dense"] = made(dtype, 5, 7, seed=i)
        model[f"{dtype} odd"] = made(dtype, 1029, seed=i)
        model[f"{dtype} gaps"] = made(dtype, 8, 9, seed=i)[:, 1::3]
        model[f"{dtype} scalar"] = made(dtype, 1, seed=i)[0]
    return model


def packed() -> Model:
    """As quantized layers hold them: two to eight values in an integer, and their scales."""
    return {
        "int4 in int32": made(torch.int32, 64, 32, seed=1),
        "int4 in uint8": made(torch.uint8, 64, 128, seed=2),
        "int2 in uint8, transposed": made(torch.uint8, 64, 64, seed=3).t(),
        "scales": made(torch.float16, 64, 8, seed=4).view(torch.uint8).view(torch.float16),
        "zeros": made(torch.uint8, 64, 8, seed=5),
    }


def many_runs() -> Model:
    """Tensors in thousands of runs of bytes each, one of them larger than the scratch on either side."""
    wide = made(torch.uint8, 20_000, 1024, seed=1)
    return {
        "large": wide[:, :1000],
        "rows": made(torch.float32, 3000, 9, seed=2)[:, 2:7],
        "rows, transposed": made(torch.int16, 3000, 9, seed=3)[:, ::2].t(),
        "rows, tied": made(torch.uint8, 4000, 5, seed=4)[:, :4],
        "between": wide[:, 1001:1003],
        "cube": made(torch.float32, 60, 61, 5, seed=5)[:, :40, 1:3],
    }


def tied_many_runs() -> Model:
    model = many_runs()
    assert isinstance(model, dict)
    model["the same rows"] = model["rows, tied"]
    model["fewer of the same rows"] = model["rows, tied"][100:3000]
    return model


def overlapping() -> Model:
    """Tensors whose own elements share memory."""
    line = made(torch.int32, 5000, seed=1)
    return {
        "expanded": made(torch.float32, 1, 40, seed=2).expand(1000, 40),
        "expanded scalar": made(torch.float64, 1, seed=3).expand(100, 100),
        "windows": line.unfold(0, 64, 2),
        "sparse windows": line.as_strided((1500, 2), (3, 3)),
        "twice in many runs": made(torch.uint8, 9000, seed=4).as_strided((1100, 1100), (2, 2)),
        "expanded columns": made(torch.int16, 2000, 1, seed=5)[::2].expand(1000, 3),
    }


def many() -> Model:
    memory = noise(20_000 * 48, 1)
    return {f"layers.{i}.weight": memory[i * 48 : i * 48 + 40].clone().view(torch.float16) for i in range(20_000)}


GENERATED: Mapping[str, Callable[[], Model]] = {
    make.__name__.lower(): make
    for make in (
        plain, Tied, Views, strided, Buffers, small, nothing, dtypes, packed, many_runs, tied_many_runs, overlapping,
        many,
    )
}  # fmt: skip


# What a model holds.


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor by name."""
    return dict(walk(model).tensors)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements as integers, which compare bit for bit whatever they mean."""
    tensor = tensor.detach()
    if tensor.element_size() == 16:
        tensor = torch.view_as_real(tensor)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def fingerprints(model: Any) -> dict[str, str]:
    """A hash of each tensor's elements, in order, that owes nothing to tensorfork."""
    found = {}
    for name, tensor in tensors_of(model).items():
        flat = bits(tensor).reshape(-1).contiguous().view(torch.uint8)
        found[name] = hashlib.sha256(memoryview(flat.numpy())).hexdigest()
    return found


def memory_of(model: Any) -> dict[int, torch.Tensor]:
    """Each storage, whole, as bytes, by its address."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in tensors_of(model).values()
        if tensor.numel()
    }
    return {
        at: torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        for at, storage in storages.items()
    }


def scramble(model: Any) -> None:
    """Change every byte of its storages, also those between tensors."""
    with torch.inference_mode():
        for memory in memory_of(model).values():
            memory.bitwise_not_()


def unused_bytes(model: Any) -> dict[int, bytes]:
    """By storage, the bytes that belong to no tensor of the model."""
    memory = memory_of(model)
    unused = {at: torch.ones(len(whole), dtype=torch.bool) for at, whole in memory.items()}
    for tensor in tensors_of(model).values():
        if tensor.numel():
            size = tensor.element_size()
            shape, stride = [*tensor.shape, size], [*(step * size for step in tensor.stride()), 1]
            mask = unused[tensor.untyped_storage().data_ptr()]
            mask.as_strided(shape, stride, tensor.storage_offset() * size).fill_(False)
    return {at: memoryview(whole[unused[at]].numpy()).tobytes() for at, whole in memory.items()}
