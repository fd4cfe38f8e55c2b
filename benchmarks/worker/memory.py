"""What a fork adds to a process while it runs: peak resident memory, and peak GPU memory."""

import re
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker.state import WorkerState

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def start_recording(state: WorkerState) -> None:
    """Note the memory in use, and begin to record the peaks."""
    state.sync()
    before: dict[str, Any] = {"host": _resident("VmRSS"), "reset": _reset_peak()}
    if state.on_gpu:
        torch.cuda.reset_peak_memory_stats(state.device)
        before["torch"] = torch.cuda.memory_allocated(state.device)
        before["monitor"] = _FreeMemoryMonitor(state.device)
    state.resources["memory"] = before


def stop_recording(state: WorkerState) -> dict[str, float | None]:
    """The peaks since `start_recording`, in MiB above what was in use then.

    `host` is the process's resident memory, None where this machine does not tell it. `gpu` is what torch's allocator
    handed out; `device` is what the driver handed out to all processes that use the GPU.
    """
    before = state.resources.pop("memory")
    peaks = {"host": (_resident("VmHWM") - before["host"]) / 2**20 if before["reset"] else None}
    if state.on_gpu:
        peaks["gpu"] = (torch.cuda.max_memory_allocated(state.device) - before["torch"]) / 2**20
        peaks["device"] = before["monitor"].stop() / 2**20
    return peaks


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return _resident("VmRSS")


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1]) << 10


def _reset_peak() -> bool:
    """Reset VmHWM, the peak of resident memory; whether it worked, since not every container allows it."""
    try:
        REFERENCES.write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") <= _resident("VmRSS") + (4 << 20)


class _FreeMemoryMonitor:
    """Polls a GPU's free memory every 2 ms for its minimum, in a thread."""

    def __init__(self, device: str) -> None:
        self._device, self._stopped = device, threading.Event()
        self._before = self._minimum = torch.cuda.mem_get_info(device)[0]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop polling; by how many bytes the free memory fell."""
        self._stopped.set()
        self._thread.join()
        return self._before - self._minimum

    def _run(self) -> None:
        while not self._stopped.wait(0.002):
            self._minimum = min(self._minimum, torch.cuda.mem_get_info(self._device)[0])
