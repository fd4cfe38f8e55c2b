"""What a fork adds to a process while it runs: peak resident memory, and peak GPU memory."""

import re
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker.state import State

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def begin(state: State) -> None:
    """From here on."""
    state.sync()
    found: dict[str, Any] = {"host": _resident("VmRSS"), "reset": _reset_peak()}
    if state.on_gpu:
        torch.cuda.reset_peak_memory_stats(state.device)
        found["torch"] = torch.cuda.memory_allocated(state.device)
        found["watch"] = _Watch(state.device)
    state.kept["memory"] = found


def end(state: State) -> dict[str, float | None]:
    """To here: MiB beyond what was there. None where this machine does not tell.

    `gpu` is what torch's allocator handed out at most; `device`, what the driver did, everybody's use of that GPU
    taken together.
    """
    before = state.kept.pop("memory")
    found = {"host": (_resident("VmHWM") - before["host"]) / 2**20 if before["reset"] else None}
    if state.on_gpu:
        found["gpu"] = (torch.cuda.max_memory_allocated(state.device) - before["torch"]) / 2**20
        found["device"] = before["watch"].stop() / 2**20
    return found


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1]) << 10


def _reset_peak() -> bool:
    """Let VmHWM begin anew; not every container allows it."""
    try:
        REFERENCES.write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") <= _resident("VmRSS") + (4 << 20)


class _Watch:
    """The least free memory of a GPU, looked at every 2 ms."""

    def __init__(self, device: str) -> None:
        self._device, self._ended = device, threading.Event()
        self._before = self._least = torch.cuda.mem_get_info(device)[0]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._before - self._least

    def _run(self) -> None:
        while not self._ended.wait(0.002):
            self._least = min(self._least, torch.cuda.mem_get_info(self._device)[0])
