"""Loading what computes digests on a GPU, once a process, before bytes move: beside copies it would take longer than the
digests themselves.
"""

import threading
from collections.abc import Iterable

import torch

from tensorfork.digest.batch import DigestBatch
from tensorfork.memory import cuda, streams

TIMEOUT = 5.0
"""Seconds that `wait` waits for each GPU. A digest that comes earlier loads its kernel itself."""

_threads: dict[torch.device, threading.Thread] = {}


def begin(devices: Iterable[torch.device]) -> None:
    """Start to load on these GPUs, each on a thread of its own; does nothing for a GPU where that has begun."""
    for device in devices:
        if device.type == "cuda" and device not in _threads:
            _threads[device] = threading.Thread(target=_load, args=(device,), name="tensorfork-warm-up", daemon=True)
            _threads[device].start()


def wait(devices: Iterable[torch.device]) -> None:
    """Wait until what `begin` started on these GPUs has ended."""
    for device in devices:
        if device in _threads:
            _threads[device].join(TIMEOUT)


def _load(device: torch.device) -> None:
    cuda.relax_capture()
    with streams.on_side_streams([device]):
        DigestBatch.of({"": torch.empty(1, dtype=torch.int64, device=device)}).compute()
