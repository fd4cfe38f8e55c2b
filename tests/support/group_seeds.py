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
"""A deadline that is easily met."""
SLOW = 4 << 20
"""Bytes a second of a transfer that something happens to halfway."""
BACKENDS = [
    pytest.param(("gloo", "cpu", "cpu"), id="gloo"),
    pytest.param(("nccl", "cuda:0", "cuda:1"), id="nccl", marks=pytest.mark.gpu(2)),
]
Backend = tuple[str, str, str]


def transport(name: str, **options: Any) -> tensorfork.Transport:
    return NCCL(**options) if name == "nccl" else Gloo(**options)


def model(device: str, sizes: Sequence[int], seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of random bytes, the same for the same seed; zeros without a seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    tensors = {
        f"t{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        if seed is not None
        else torch.zeros(nbytes, dtype=torch.uint8)
        for i, nbytes in enumerate(sizes)
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


Part = tuple[str, str, Sequence[int], int]
"""Part of a seed's model: a prefix for its names, a device, the tensors' sizes in bytes, and a random seed."""


def publish_parts(
    pipe: Any, parts: Sequence[Part], transports: Sequence[str | tensorfork.Transport] | None, options: dict[str, Any]
) -> None:
    """Publish these parts as one model until told to end."""
    theirs = {prefix + name: tensor for prefix, *args in parts for name, tensor in model(*args).items()}
    with tensorfork.publish(theirs, transports=transports, **options) as seed:
        pipe.send(seed.address)
        try:
            pipe.recv()
        except EOFError:
            return


@contextmanager
def published(
    *parts: Part, transports: Sequence[str | tensorfork.Transport] | None = None, **options: Any
) -> Iterator[str]:
    """The address of a seed in a process of its own, which NCCL needs. `options` are more arguments of `publish`."""
    with Child(publish_parts, parts, transports, options) as child:
        yield child.recv()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())
