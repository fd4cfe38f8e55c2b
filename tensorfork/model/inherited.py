"""The versions of models that were forked into: a seed that publishes one of them goes on with its lineage."""

import threading
import weakref
from collections.abc import Mapping

import torch

from tensorfork.lineage import Version, check_label

_State = tuple[weakref.ref[torch.Tensor], int, int]
"""A tensor, its address, and how often torch has changed it in place."""

_lock = threading.Lock()
_remembered: dict[int, tuple[Version, list[_State]]] = {}
"""By the id of a model's first tensor, as a fork left it."""


def remember_version(tensors: Mapping[str, torch.Tensor], version: Version | None) -> None:
    """Remember that these tensors have been filled with a version."""
    if not tensors or version is None:
        return
    states = [_state(tensor) for tensor in tensors.values()]
    first = next(iter(tensors.values()))
    key = id(first)
    weakref.finalize(first, _remembered.pop, key, None).atexit = False
    with _lock:
        _remembered[key] = version, states


def version_of(tensors: Mapping[str, torch.Tensor], given: Version | str | None) -> Version:
    """The version of tensors that are to be published.

    That is the one given; else that of the fork that filled them, if they are the same and torch knows of no change
    since; else the first of a new lineage. A label that is given names the version.
    """
    if isinstance(given, Version):
        return given
    check_label(given)
    known = _remembered.get(id(next(iter(tensors.values())))) if tensors else None
    if given is None and known is not None:
        version, states = known
        if [_key(_state(tensor)) for tensor in tensors.values()] == [_key(state) for state in states]:
            return version
    return Version.first(given)


def _state(tensor: torch.Tensor) -> _State:
    changes = 0 if tensor.is_inference() else tensor._version
    return weakref.ref(tensor), tensor.data_ptr(), changes


def _key(state: _State) -> tuple[int, int, int]:
    return id(state[0]()), state[1], state[2]
