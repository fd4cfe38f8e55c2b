"""Exclusive filling: of two forks of this process into one model at once, the second is refused."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from weakref import ref

import torch

from tensorfork.model.describe import LocalModel
from tensorfork.runs import union

_in_progress: dict[object, ref[LocalModel]] = {}
"""The models that forks of this process are filling. Weak, so that an entry left by an interrupt disappears."""

_lock = threading.RLock()
"""Held from the check of the entries until the new one is added. Entries are removed without it, since the garbage
collector may remove one anywhere, also while this thread holds the lock."""


@contextmanager
def exclusive_fill(ours: LocalModel) -> Iterator[None]:
    """Around a fork into these tensors: two forks at once would overwrite what the other one has verified.

    Raises `ValueError` while another fork of this process fills some of these tensors, or some of their bytes.
    """
    key = object()
    try:
        with _lock:
            others = [other for entry in list(_in_progress.values()) if (other := entry()) is not None]
            if any(_overlap(ours, other) for other in others):
                raise ValueError("another fork into this model is under way in this process; wait until it has ended")
            _in_progress[key] = ref(ours, lambda _: _in_progress.pop(key, None))
        if not all(tensor.is_meta for tensor in _meta_tensors(ours)):
            raise ValueError("another fork into this model ended while this one examined it; fork again")
        yield
    finally:
        _in_progress.pop(key, None)


def _overlap(one: LocalModel, other: LocalModel) -> bool:
    """Whether the two have meta tensors, or bytes, in common."""
    ids = {id(tensor) for tensor in _meta_tensors(one)}
    if any(id(tensor) in ids for tensor in _meta_tensors(other)):
        return True
    spans = sorted([*_spans(one), *_spans(other)])
    return any(before[1] > after[0] for before, after in pairwise(spans))


def _meta_tensors(ours: LocalModel) -> list[torch.Tensor]:
    addresses = ours.memory.addresses
    return [ours.tensors[tensor.name] for tensor in ours.layout.tensors if addresses[tensor.storage] is None]


def _spans(ours: LocalModel) -> list[tuple[int, int]]:
    """The (start, end) addresses of the tensors, with the gaps between their elements; merged where they overlap."""
    addresses = ours.memory.addresses
    based = ((addresses[tensor.storage], tensor) for tensor in ours.layout.tensors if tensor.numel)
    starts = ((base + tensor.offset, tensor.extent) for base, tensor in based if base is not None)
    return union((start, start + extent) for start, extent in starts)


def _after_fork() -> None:
    """In the child, the threads that were filling these models do not exist."""
    global _lock
    _lock = threading.RLock()
    _in_progress.clear()


os.register_at_fork(after_in_child=_after_fork)
