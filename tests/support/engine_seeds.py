"""Seeds over TransferEngine's TCP in a process of their own, and helpers of the tests that use them."""

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import tensorfork
from tensorfork import TransportUnavailable
from tensorfork.transports.transfer_engine import TransferEngine, engine, library
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion

SOON = 60.0


def _why_no_mooncake() -> str | None:
    try:
        library.installed_wheel()
        library.load()
    except TransportUnavailable as error:
        return str(error)
    return None


_without = _why_no_mooncake()
needs_mooncake = pytest.mark.skipif(_without is not None, reason=f"needs Mooncake: {_without}")

OFFERED = ["transfer_engine:tcp"]
BIG = 80 << 20
"""More reads of 1 MiB than two windows take: when the first has arrived, some have not started."""


def tensors(count: int, nbytes: int, value: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors in storages of their own, each full of one value; by default each of another."""
    return {
        f"t{i}": torch.full((nbytes,), i % 251 if value is None else value, dtype=torch.uint8) for i in range(count)
    }


def empty(count: int, nbytes: int) -> dict[str, torch.Tensor]:
    return tensors(count, nbytes, 255)


def small_pieces() -> TransferEngine:
    return TransferEngine(fabric="tcp", piece=1 << 20)


def seeds(pipe: Connection) -> None:
    """The process: executes commands from the pipe, and answers each, until the pipe is closed.

    ("publish", count, nbytes) -> the address of a seed; ("map", nbytes) -> the address of a seed whose memory
    ("free", close_first) unmaps; ("registered",) -> the number of registrations.
    """
    kept: list[Any] = []
    mapped: list[tuple[tensorfork.Seed, int, int]] = []
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            break
        if what == "publish":
            model = tensors(*args)
            kept.append(tensorfork.publish(model, transports=OFFERED))
            pipe.send(kept[-1].address)
        elif what == "map":
            memory = mmap.mmap(-1, args[0])
            kept.append(memory)
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            mapped.append((tensorfork.publish({"t0": tensor}, transports=OFFERED), tensor.data_ptr(), args[0]))
            pipe.send(mapped[-1][0].address)
        elif what == "free":
            seed, start, nbytes = mapped.pop()
            kept.append(seed)
            if args[0]:
                seed.close()
            assert _libc().munmap(start, nbytes) == 0
            pipe.send("freed")
        elif what == "registered":
            pipe.send(len(engine.get_engine("tcp", "127.0.0.1").registrations))
    for one in kept:
        if isinstance(one, tensorfork.Seed):
            one.close()
    os._exit(0)  # without destructors, which would unmap the memory a second time


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class OnFirstBytes:
    """A progress callback that does something when the first bytes have arrived, or when it is time.

    `called` is when it had been done, by `time.monotonic()`.
    """

    def __init__(
        self, do: Callable[[], Any], when: Callable[[int, int], bool] = lambda moved, total: moved > 0
    ) -> None:
        self._do: Callable[[], Any] | None = do
        self._when, self.called = when, 0.0

    def __call__(self, moved: int, total: int) -> None:
        if self._when(moved, total) and self._do is not None:
            do, self._do = self._do, None
            do()
            self.called = time.monotonic()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def has_expected_values(model: dict[str, torch.Tensor]) -> bool:
    return all(bool((tensor == i % 251).all()) for i, tensor in enumerate(model.values()))


@contextmanager
def silent_engine() -> Iterator[bytes]:
    """The offer of a seed that takes connections and never answers, as one that is stopped does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        yield Offer("tcp", b"silent..", bytes(8), port, {0: OfferedRegion(1 << 20, ())}).pack()
