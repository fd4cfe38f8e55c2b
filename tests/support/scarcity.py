"""Child processes in which something has run out: descriptors, threads, memory."""

import encodings.idna  # noqa: F401  # somebody else may not be allowed to read it later
import gc
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import tensorfork

SECONDS = 30.0
NAMES = ("a", "b", "c")
USER = 54_321
"""A user that has no other process, so that a limit for its threads is this process's."""


def filled(nbytes: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(nbytes, dtype=torch.uint8) for name in NAMES}


@contextmanager
def lowered(which: int, soft: int) -> Iterator[None]:
    """Inside, a limit of this process's is lower. It can be raised again, as the hard one stays."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def descriptors(more: int) -> Iterator[None]:
    """Inside, this process gets so many more descriptors."""
    with lowered(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1 + more):
        yield


def become_somebody() -> None:
    """No limit for threads holds for root."""
    if not os.getuid():
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)


@contextmanager
def threads(more: int) -> Iterator[None]:
    """Inside, this process gets so many more threads. Without root's rights, only for 0 of them."""
    with lowered(resource.RLIMIT_NPROC, len(os.listdir("/proc/self/task")) + more if os.getuid() == USER else 1):
        yield


@contextmanager
def memory(more: int) -> Iterator[None]:
    """Inside, this process gets so many more bytes of address space."""
    gc.collect()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    with lowered(resource.RLIMIT_AS, used + more):
        yield


@contextmanager
def first_threads(count: int) -> Iterator[None]:
    """Inside, Python starts so many threads, and then no more."""
    start, left = threading.Thread.start, [count]

    def limited(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    threading.Thread.start = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


LIMITS: dict[str, Callable[[int], Any]] = {
    "file descriptors": descriptors,
    "threads": threads,
    "Python's threads": first_threads,
    "memory": memory,
}


def fork_under(pipe: Any, address: str, nbytes: int) -> None:
    """A process that forks. ("fork", limit, more, kind, transport) -> the name of the error's type and what it says has
    run out, both None if it succeeds; the device that the model is on, and whether it is as it was.
    """
    for transport in ("zeromq", "gloo"):  # what is imported and made once is there
        tensorfork.fork(address, device="cpu", transport=transport, timeout=SECONDS)
    become_somebody()
    while True:
        try:
            _, limit, more, kind, transport = pipe.recv()
        except EOFError:
            return
        ours = {name: torch.zeros(nbytes, dtype=torch.uint8, device=kind) for name in NAMES}
        error = None
        with LIMITS[limit](more):
            try:
                tensorfork.fork_into(ours, address, device="cpu", transport=transport, timeout=SECONDS)
            except Exception as raised:
                error = raised
        kept = all(tensor.is_meta or not bool(tensor.any()) for tensor in ours.values())
        resource = getattr(error, "resource", None)
        name = None if error is None else type(error).__name__
        pipe.send((name, resource or str(error), {str(tensor.device) for tensor in ours.values()}, kept))


def publish_under(
    pipe: Any, nbytes: int, used: Sequence[str] = ("zeromq", "gloo"), offered: Sequence[str] | None = None
) -> None:
    """A process with a seed, some of whose transports were used before.

    ("limit", name, more) and ("lift",) set and end a limit; ("running",) -> its leases.
    """
    with tensorfork.publish(filled(nbytes), transports=offered) as seed, ExitStack() as limits:
        for transport in used:
            tensorfork.fork(seed.address, device="cpu", transport=transport, timeout=SECONDS)
        become_somebody()
        pipe.send(seed.address)
        while True:
            try:
                what, *args = pipe.recv()
            except EOFError:
                return
            if what == "limit":
                limits.enter_context(LIMITS[args[0]](args[1]))
            if what == "lift":
                limits.close()
            pipe.send(seed.stats().running)


def publish_with(pipe: Any, nbytes: int) -> None:
    """A process that publishes. (limit, more, snapshot) -> what comes of it, as `fork_under` says it."""
    tensorfork.publish(filled(nbytes)).close()
    become_somebody()
    while True:
        try:
            limit, more, snapshot = pipe.recv()
        except EOFError:
            return
        ours, error = filled(nbytes), None
        with LIMITS[limit](more):
            try:
                tensorfork.publish(ours, snapshot=snapshot).close()
            except Exception as raised:
                error = raised
        pipe.send((None if error is None else type(error).__name__, getattr(error, "resource", None) or str(error)))


def close_under(pipe: Any, nbytes: int, limit: str, transport: str) -> None:
    """A process with a seed, which is closed while a limit holds: it sends its address, and once it hears something the
    leases that run, before and after `close`.
    """
    seed = tensorfork.publish(filled(nbytes), transports=[transport])
    tensorfork.fork(seed.address, device="cpu", transport=transport, timeout=SECONDS)
    become_somebody()
    pipe.send(seed.address)
    with LIMITS[limit](0):
        pipe.recv()
        before = seed.stats().running
        seed.close()
        pipe.send((before, seed.stats().running))
