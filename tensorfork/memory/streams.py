"""CUDA streams of our own, which torch's pool does not give to anything else."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch

from tensorfork.memory.cuda import STREAM_NON_BLOCKING, current_context, driver, raise_on_error, relaxed_capture


def acquire_stream(device: int) -> torch.cuda.Stream:
    """A stream that is the caller's alone until `release_stream`.

    torch's own streams come from a pool of 32, on which an engine captures and computes too; making that pool takes
    milliseconds.
    """
    idle = _idle_streams.setdefault(device, [])
    try:
        return idle.pop()
    except IndexError:
        handle = ctypes.c_void_p()
        with current_context(device), relaxed_capture():
            raise_on_error(driver().cuStreamCreate(ctypes.byref(handle), STREAM_NON_BLOCKING), "cuStreamCreate")
        assert handle.value is not None
        return torch.cuda.ExternalStream(handle.value, torch.device("cuda", device))


def release_stream(stream: torch.cuda.Stream) -> None:
    """Keep the stream for the next `acquire_stream`. It is never destroyed, because torch's allocator remembers it."""
    _idle_streams[stream.device.index].append(stream)


_idle_streams: dict[int, list[torch.cuda.Stream]] = {}


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return acquire_stream(device.index)


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, torch's work goes to this stream.

    `torch.cuda.stream` alone would make the GPU that was current before current again, and if this process did not use
    that yet, create a context there: 0.15 s, and half a gigabyte of a GPU that may be another process's.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@contextmanager
def on_side_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, torch's work on these GPUs goes to streams of our own; it neither waits for the model's nor delays that.
    The process has one such stream for each device, so that torch's allocator reuses the scratch.
    """
    with ExitStack() as entered:
        for device in devices:
            if device.type == "cuda":
                entered.enter_context(on_stream(_side_stream(device)))
        yield
