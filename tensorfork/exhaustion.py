"""What the system, torch and libzmq raise when memory, file descriptors or threads run out, and what we make of it.

Each says so in its own way. This is the only place that knows them: `resources` goes round what a caller calls.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tensorfork.errors import ResourceExhausted, TensorForkError

MEMORY, DESCRIPTORS, THREADS = "memory", "file descriptors", "threads"

_ADVICE = {
    MEMORY: "Free some, or give the process more",
    DESCRIPTORS: "Raise the limit (ulimit -n), or close some",
    THREADS: "Raise the limit (ulimit -u, or the container's limit of processes), or end some",
}
_ERRNOS = {errno.ENOMEM: MEMORY, errno.EMFILE: DESCRIPTORS, errno.ENFILE: DESCRIPTORS}
_PHRASES = {
    "can't allocate memory": MEMORY,  # torch's allocator for CPUs
    "not enough memory": MEMORY,
    "out of memory": MEMORY,  # the CUDA runtime, for pinned memory too
    "OUT_OF_MEMORY": MEMORY,  # its driver
    "Cannot allocate memory": MEMORY,  # the C library
    "Too many open files": DESCRIPTORS,
    "can't start new thread": THREADS,  # Python
    "Resource temporarily unavailable": THREADS,  # std::thread, in torch's stores and groups
}
"""What stands in errors that have no type and no number for it. Of the C library, C++ and CUDA, in English always."""


def exhaustion(what: str, resource: str) -> ResourceExhausted:
    """The error, for a resource whose want was noticed: `what` says how."""
    return ResourceExhausted(
        f"this process has no {resource} left for it: {what}. {_ADVICE[resource]}.", resource=resource
    )


def exhausted(error: BaseException) -> ResourceExhausted | None:
    """What to raise in place of an error that says, or whose cause does, that something has run out; None otherwise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ResourceExhausted):
            return cause
        if resource := _resource(cause):
            return exhaustion(str(cause).split("\n", 1)[0] or type(cause).__name__, resource)
        cause = cause.__cause__
    return None


@contextmanager
def resources() -> Iterator[None]:
    """Inside, an error that says that something has run out becomes `ResourceExhausted`. Our own errors stay."""
    try:
        yield
    except TensorForkError:
        raise
    except Exception as error:
        if found := exhausted(error):
            raise found from error
        raise


def _resource(error: BaseException) -> str | None:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MEMORY
    if isinstance(error, TensorForkError):
        return None
    number = getattr(error, "errno", None)
    if number is not None:  # OSError's, and libzmq's
        return _ERRNOS.get(number)
    text = str(error)
    return next((resource for phrase, resource in _PHRASES.items() if phrase in text), None)
