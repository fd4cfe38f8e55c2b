"""Seeds for tests of forks over process groups: gloo here, nccl where there are two GPUs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from processes import Child

import tensorfork
from tensorfork.transports.process_group import NCCL, Gloo

SECONDS = 60.0
"""A deadline that is kept with ease."""
SLOW = 4 << 20
"""Bytes a second, of a transfer in the middle of which something happens."""
BACKENDS = [
    pytest.param(("gloo", "cpu", "cpu"), id="gloo"),
    pytest.param(("nccl", "cuda:0", "cuda:1"), id="nccl", marks=pytest.mark.gpu(2)),
]
Backend = tuple[str, str, str]


def transport(name: str, **options: Any) -> tensorfork.Transport:
    return NCCL(**options) if name == "nccl" else Gloo(**options)


def model(device: str, sizes: Sequence[int], seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of bytes: the same for the same seed, or zeros."""
    draw = torch.Generator().manual_seed(seed or 0)
    made = {
        f"t{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=draw)
        if seed is not None
        else torch.zeros(nbytes, dtype=torch.uint8)
        for i, nbytes in enumerate(sizes)
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


Part = tuple[str, str, Sequence[int], int]
"""Of a seed's model: a prefix for its names, its device, the tensors' bytes, and what they are drawn from."""


def a_seed(pipe: Any, parts: Sequence[Part], transports: Sequence[tensorfork.Transport] | None) -> None:
    """Publishes until told to end."""
    theirs = {prefix + name: tensor for prefix, *args in parts for name, tensor in model(*args).items()}
    with tensorfork.publish(theirs, transports=transports) as seed:
        pipe.send(seed.address)
        try:
            pipe.recv()
        except EOFError:
            return


@contextmanager
def published(*parts: Part, transports: Sequence[tensorfork.Transport] | None = None) -> Iterator[str]:
    """The address of a seed in a process of its own, as NCCL wants it."""
    with Child(a_seed, parts, transports) as child:
        yield child.recv()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())
