"""Modes of torch that a caller's thread may be in."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class RefusingDispatch(TorchDispatchMode):
    """A caller's mode. No operation of ours may reach it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} reached the caller's mode")


class RefusingFunctions(TorchFunctionMode):
    """The same, for functions of torch's Python interface."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} reached the caller's mode")


def fake() -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def functional() -> Any:
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    return FunctionalTensorMode()


@contextlib.contextmanager
def functionalization() -> Iterator[None]:
    torch._enable_functionalization(reapply_views=True)
    try:
        yield
    finally:
        torch._disable_functionalization()


def default_device(device: str) -> Callable[[], Any]:
    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        torch.set_default_device(device)
        try:
            yield
        finally:
            torch.set_default_device(None)

    return changed


@contextlib.contextmanager
def default_tensor_type() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        torch.set_default_tensor_type(torch.HalfTensor)
        try:
            yield
        finally:
            torch.set_default_tensor_type(torch.FloatTensor)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "set_default_device('meta')": default_device("meta"),
    "set_default_device('cuda')": default_device("cuda"),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "set_default_tensor_type": default_tensor_type,
    "use_deterministic_algorithms": deterministic,
    "a TorchDispatchMode": RefusingDispatch,
    "a TorchFunctionMode": RefusingFunctions,
    "FakeTensorMode": fake,
    "FunctionalTensorMode": functional,
    "functionalization": functionalization,
}
