"""Two forks into one model at once: the second is refused."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from weakref import ref

import torch

from tensorfork.fork.runs import union
from tensorfork.model.describe import LocalModel

_filled: dict[object, ref[LocalModel]] = {}
"""What forks of this process fill just now. Weak: one that an interrupt leaves in goes with its frame."""

_lock = threading.RLock()
"""From a look at these to an entry. They are taken out without it, as the garbage collector may do that anywhere."""


@contextmanager
def exclusive_fill(ours: LocalModel) -> Iterator[None]:
    """Round a fork into these tensors: of two at once, each would write over what the other one has verified.

    Raises `ValueError` while another one of this process fills some of them, or of the same bytes.
    """
    mark = object()
    try:
        with _lock:
            others = [other for held in list(_filled.values()) if (other := held()) is not None]
            if any(_meet(ours, other) for other in others):
                raise ValueError("another fork into this model is under way in this process; wait until it has ended")
            _filled[mark] = ref(ours, lambda _: _filled.pop(mark, None))
        if not all(tensor.is_meta for tensor in _metas(ours)):
            raise ValueError("another fork into this model ended while it was looked at; fork again")
        yield
    finally:
        _filled.pop(mark, None)


def _meet(one: LocalModel, other: LocalModel) -> bool:
    """Whether the two have meta tensors, or bytes, in common."""
    ids = {id(tensor) for tensor in _metas(one)}
    if any(id(tensor) in ids for tensor in _metas(other)):
        return True
    both = sorted([*_stretches(one), *_stretches(other)])
    return any(before[1] > after[0] for before, after in pairwise(both))


def _metas(ours: LocalModel) -> list[torch.Tensor]:
    addresses = ours.memory.addresses
    return [ours.tensors[tensor.name] for tensor in ours.layout.tensors if addresses[tensor.storage] is None]


def _stretches(ours: LocalModel) -> list[tuple[int, int]]:
    """From where to where tensors lie, gaps between their elements included; none of them overlap."""
    addresses = ours.memory.addresses
    starts = ((addresses[tensor.storage], tensor) for tensor in ours.layout.tensors if tensor.numel)
    firsts = ((base + tensor.offset, tensor.extent) for base, tensor in starts if base is not None)
    return union((first, first + extent) for first, extent in firsts)


def _after_fork() -> None:
    """In the child: whoever was filling these is not there."""
    global _lock
    _lock = threading.RLock()
    _filled.clear()


os.register_at_fork(after_in_child=_after_fork)
