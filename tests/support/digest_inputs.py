"""Bytes to compute digests of, and a definition that is quicker to test."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tensorfork.digest import definition


@contextmanager
def segments_of(words: int) -> Iterator[None]:
    """A definition with short segments, so that a test need not have hundreds of megabytes."""
    usual = definition.SEGMENT, definition._WORDS, definition._SUMS
    definition.SEGMENT, definition._WORDS, definition._SUMS = (
        words * 8,
        words,
        definition.COLUMNS + -(-words // definition.WIDTH),
    )
    try:
        yield
    finally:
        definition.SEGMENT, definition._WORDS, definition._SUMS = usual


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(max(nbytes, 1))), dtype=torch.uint8)[:nbytes]
