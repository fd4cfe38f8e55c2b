"""Many forks at once, each in a process of its own."""

import ctypes
import json
import os
import signal
import time
from typing import Any

import tensorfork
from benchmarks.worker.state import WorkerState


def fork_at_once(state: WorkerState, *, address: str, count: int, seconds: float) -> dict[str, Any]:
    """So many processes, all at once, fork into copies of the worker's model, which is on the meta device.

    They are children of this one, with all imports done. Returns the seconds from the start until each was done, and
    the errors of those that failed.
    """
    (go, start), (done, report) = os.pipe(), os.pipe()
    children = [_begin(state, address, seconds, go, start, report) for _ in range(count)]
    os.close(go)
    os.close(report)
    began = time.monotonic()
    os.close(start)
    with os.fdopen(done) as lines:
        ended = [json.loads(line) for line in lines]
    for child in children:
        os.waitpid(child, 0)
    took = [one["ended"] - began for one in ended if one["error"] is None]
    errors = [one["error"] for one in ended if one["error"] is not None]
    return {"seconds": took, "errors": errors + ["it died"] * (count - len(ended))}


def _begin(state: WorkerState, address: str, seconds: float, go: int, start: int, report: int) -> int:
    """A child that waits until the other end of `go` is closed; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.close(start)
        os.read(go, 1)
        error = _error_of_fork(state, address, seconds)
        os.write(report, json.dumps({"ended": time.monotonic(), "error": error}).encode() + b"\n")
    finally:
        os._exit(0)


def _error_of_fork(state: WorkerState, address: str, seconds: float) -> str | None:
    try:
        found = tensorfork.fork_into(state.model, address, device="cpu", transport="zeromq", timeout=seconds)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None if found.verified else "it was not verified"
