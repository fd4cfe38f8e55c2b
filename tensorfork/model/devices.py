"""The device that a caller names for new tensors."""

from typing import Any

import torch

Device = str | torch.device | None


def usable_device(device: Any, argument: str = "device") -> torch.device | None:
    """The device that a caller names, with its index if it is a GPU; None if none is named.

    Raises `ValueError` for one that has no memory to fill, or that this process does not have, and `TypeError` for what
    is no device. `argument` is named in the error.
    """
    if device is None:
        return None
    if not isinstance(device, str | torch.device):
        raise TypeError(f"{argument} must be a device or its name, such as 'cpu' or 'cuda:0', not {device!r}")
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{argument}={device!r} is no device; write 'cpu', 'cuda' or 'cuda:0'") from error
    if named.type == "cpu":
        return torch.device("cpu")
    if named.type == "meta":
        raise ValueError(f"{argument}='meta' has no memory to fork into; name a device that has, or none")
    if named.type != "cuda":
        raise ValueError(f"{argument}={str(device)!r}: tensors can be forked to CPUs and CUDA's GPUs alone")
    if not torch.cuda.is_available():
        raise ValueError(f"{argument}={str(device)!r}, and CUDA finds no GPU in this process; say {argument}='cpu'")
    if str(named) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if named.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"{argument}={str(device)!r}, and this process sees {count} GPUs, from cuda:0 on")
    return named
