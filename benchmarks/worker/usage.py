"""What a seed takes while peers do what they like: the peaks of memory, threads, descriptors and leases."""

import os
import resource
import threading
import time
from typing import Any

from benchmarks.worker import memory
from benchmarks.worker.state import Skip, WorkerState

PERIOD = 0.01
"""Seconds between two looks."""


def limit_descriptors(state: WorkerState, *, soft: int) -> None:
    """Set how many descriptors this process may have. Raises `Skip` where it may not have so many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and soft > hard:
        raise Skip(f"a process may have {hard} descriptors here, and {soft} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def watch(state: WorkerState) -> None:
    """Note what is in use, and begin to record the peaks."""
    memory.start_recording(state)
    state.resources["watch"] = _Watch(state.seed)


def watched(state: WorkerState) -> dict[str, float]:
    """The peaks since `watch`, beyond what was in use then: `memory` in MiB, `threads`, `descriptors` and `leases`."""
    found = state.resources.pop("watch").stop()
    exact = memory.stop_recording(state)["host"]
    return found if exact is None else found | {"memory": exact}


def cpu(state: WorkerState, *, seconds: float) -> float:
    """Milliseconds of the processor that this process takes in a second, measured over so many while it sleeps."""
    start, used = time.monotonic(), time.process_time()
    time.sleep(seconds)
    return 1e3 * (time.process_time() - used) / (time.monotonic() - start)


def wait_for_connections(state: WorkerState, *, most: int, patience: float) -> float:
    """Wait until the seed's port has no more connections than that; the seconds that it took."""
    start = time.monotonic()
    port = int(state.seed.address.rpartition(":")[2])
    while (count := _connections(port)) > most:
        if time.monotonic() - start > patience:
            raise TimeoutError(f"{count} connections are left after {patience:g} s")
        time.sleep(0.05)
    return time.monotonic() - start


def _connections(port: int) -> int:
    """How many connections to this port of ours are established and have a descriptor (proc(5), /proc/net/tcp)."""
    with open("/proc/self/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" and row[9] != "0" for row in rows)


class _Watch:
    """Looks every `PERIOD` seconds, on a thread."""

    def __init__(self, seed: Any) -> None:
        self._seed, self._stopped = seed, threading.Event()
        self._before = self._peaks = self._look()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        self._stopped.set()
        self._thread.join()
        return {what: peak - self._before[what] for what, peak in self._peaks.items()}

    def _look(self) -> dict[str, float]:
        return {
            "memory": memory.resident() / 2**20,
            "threads": len(os.listdir("/proc/self/task")),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "leases": self._seed.stats().running,
        }

    def _run(self) -> None:
        own = 1  # this thread
        while not self._stopped.wait(PERIOD):
            now = self._look()
            now["threads"] -= own
            self._peaks = {what: max(peak, now[what]) for what, peak in self._peaks.items()}
