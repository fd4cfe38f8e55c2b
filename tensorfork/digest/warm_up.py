"""Loads what computes digests on a GPU, once a process, before bytes move: while copies run, loading would take longer
than the digests themselves.
"""

import threading
from collections.abc import Iterable

import torch

from tensorfork.digest.batch import DigestBatch
from tensorfork.interpreter import ending
from tensorfork.memory import cuda, streams

TIMEOUT = 5.0
"""Seconds that `wait` waits for each GPU. Digests computed earlier load the kernel themselves."""

_threads: dict[torch.device, threading.Thread] = {}


def begin(devices: Iterable[torch.device]) -> None:
    """Start loading on these GPUs, on one thread each; does nothing for a GPU where that has begun."""
    for device in devices:
        if device.type == "cuda" and device not in _threads:
            _threads[device] = threading.Thread(target=_load, args=(device,), name="tensorfork-warm-up", daemon=True)
            _threads[device].start()


def wait(devices: Iterable[torch.device]) -> None:
    """Wait until what `begin` started on these GPUs has ended, for at most `TIMEOUT` each."""
    for device in devices:
        if device in _threads:
            _threads[device].join(TIMEOUT)


def _load(device: torch.device) -> None:
    cuda.relax_capture()
    with ending.guarded(), streams.on_side_streams([device]):
        DigestBatch.of({"": torch.empty(1, dtype=torch.int64, device=device)}).compute()
