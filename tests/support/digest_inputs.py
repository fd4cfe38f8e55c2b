"""Bytes to compute digests of, and digests in one call."""

import ctypes
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tensorfork.digest import torch_digests
from tensorfork.digest.definition import PIECE, pieces_of_words, root, roots

TUNINGS = ["cpu", "cpu, checked", "cuda"]
"""The tunings that are used. All run on the CPU here: digests must not depend on how the work is divided, or read."""
DTYPES = sorted({dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}, key=str)
DTYPES = [dtype for dtype in DTYPES if not str(dtype).startswith(("torch.qint", "torch.quint"))]


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(max(nbytes, 1))), dtype=torch.uint8)[:nbytes]


def digests(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> dict[str, int]:
    """By torch."""
    return roots(torch_digests.compute(tensors, *args, **options))


def digest(tensor: torch.Tensor, piece: int = PIECE) -> int:
    """By torch."""
    return digests({"": tensor}, piece=piece)[""]


def digest_of_words(words: list[int], piece: int = PIECE) -> int:
    """By the definition."""
    return root(pieces_of_words(words, piece))


@contextmanager
def tuned_as(device: str) -> Iterator[None]:
    usual = torch_digests._TUNING["cpu"]
    torch_digests._TUNING["cpu"] = torch_digests._TUNING[device]
    try:
        yield
    finally:
        torch_digests._TUNING["cpu"] = usual


def over(memory: torch.Tensor, dtype: torch.dtype, start: int, shape: Sequence[int], stride: Sequence[int]) -> Any:
    """A tensor of any dtype over bytes; `start` in bytes."""
    made = torch.empty(0, dtype=dtype)
    return made.set_(memory.untyped_storage(), start // dtype.itemsize, tuple(shape), tuple(stride))


def words_of(tensor: torch.Tensor) -> list[int]:
    """A tensor's bytes in the order in which they lie, element by element from its memory, as words."""
    itemsize = tensor.element_size()
    steps: list[list[int]] = []  # of each dimension, the shortest first
    for i in sorted(range(tensor.dim()), key=lambda i: (tensor.stride(i), tensor.shape[i])):
        step = list(range(0, tensor.shape[i] * tensor.stride(i), tensor.stride(i))) if tensor.stride(i) else [0]
        inner = steps[-1][1] if steps and len(steps[-1]) > 1 else 0
        if inner and len(step) > 1 and step[1] % inner == 0 and step[1] <= steps[-1][-1]:  # they overlap
            steps[-1] = sorted({one + other for one in step for other in steps[-1]})
        elif len(step) != 1:
            steps.append(step)
    places = [sum(place) for place in itertools.product(*reversed(steps))] if tensor.numel() else []
    raw = b"".join(ctypes.string_at(tensor.data_ptr() + place * itemsize, itemsize) for place in places)
    raw += bytes(-len(raw) % 8)
    return [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
