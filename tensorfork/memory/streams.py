"""CUDA streams that torch's pool does not hand to anybody else."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch

from tensorfork.memory.cuda import NON_BLOCKING, check, current_context, driver, relaxed_capture


def acquire_stream(device: int) -> torch.cuda.Stream:
    """A stream that nobody else has until `release_stream`. torch's come from a pool of 32, which an engine captures and
    computes on too, and which takes milliseconds to make.
    """
    idle = _idle_streams.setdefault(device, [])
    try:
        return idle.pop()
    except IndexError:
        made = ctypes.c_void_p()
        with current_context(device), relaxed_capture():
            check(driver().cuStreamCreate(ctypes.byref(made), NON_BLOCKING), "cuStreamCreate")
        assert made.value is not None
        return torch.cuda.ExternalStream(made.value, torch.device("cuda", device))


def release_stream(stream: torch.cuda.Stream) -> None:
    """For the next who asks. It is never destroyed, as torch's allocator remembers it."""
    _idle_streams[stream.device.index].append(stream)


_idle_streams: dict[int, list[torch.cuda.Stream]] = {}


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return acquire_stream(device.index)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, torch's work goes to this stream. `torch.cuda.stream` alone returns to the GPU that was current before,
    and if this process did not use that, makes a context there: 0.15 s, and half a gigabyte of somebody else's GPU.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@contextmanager
def on_side_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, torch's work on these GPUs goes to streams of our own, so that it neither waits for the model's nor makes
    them wait. One stream a device for the whole process: its scratch is used again.
    """
    with ExitStack() as entered:
        for device in devices:
            if device.type == "cuda":
                entered.enter_context(on_stream(_side_stream(device)))
        yield
