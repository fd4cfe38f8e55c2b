"""What a case gets: the options, the devices, and workers that are closed when the case ends."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.process import Failed, Skipped, Worker

START_TIMEOUT = 120.0
"""Seconds that a worker may take to import everything and make a CUDA context."""


@dataclass
class Bench:
    """The options and the machine, as one case sees them.

    Attributes:
        machine: the description that `benchmarks.worker.machine` gives.
        rounds: how often everything is measured.
        cold: how many fresh processes fork once, for each kind of cold fork.
        seconds: how long steps are timed, idle and during forks each, in a disturbance case.
        scale: factor for the size of every model; goals are judged only at 1.
        timeout: seconds that any one call may take.
        isolate: whether the seed and the fork each see one GPU only.
        on_gpu: whether the case's models are on GPUs.
        deadline: when the case is cut off (`time.monotonic`).
        stack: closes workers and folders when the case ends.
    """

    machine: dict[str, Any]
    rounds: int = 5
    cold: int = 3
    seconds: float = 8.0
    scale: float = 1.0
    timeout: float = 120.0
    isolate: bool = False
    on_gpu: bool = False
    deadline: float = float("inf")
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def gpus(self) -> int:
        """How many GPUs there are."""
        return len(self.machine["gpus"])

    @property
    def source(self) -> str:
        """The seed's device, numbered among all GPUs."""
        return "cuda:0" if self.on_gpu else "cpu"

    @property
    def sink(self) -> str:
        """The fork's device: another GPU than the seed's, where there is one."""
        return f"cuda:{min(1, self.gpus - 1)}" if self.on_gpu else "cpu"

    def start(self, name: str, device: str, *, own_gpu: bool = False, env: Mapping[str, str] | None = None) -> Worker:
        """Start a worker, which is closed when the case ends, or before.

        Args:
            name: the worker's name.
            device: where its tensors are to be.
            own_gpu: with `isolate`, the worker sees only its own GPU, as cuda:0.
            env: environment variables beside those of this process.
        """
        env = dict(env or {})
        if self.isolate and own_gpu and device.startswith("cuda"):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = int(device.partition(":")[2])
            env["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[index] else str(index)
            device = "cuda:0"
        return self.stack.enter_context(Worker(name, device=device, env=env))

    def ask(self, worker: Worker, call: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """Call a worker and wait for the result: for `timeout` seconds at most, and not beyond the case's deadline."""
        worker.post(call, **arguments)
        return self.result(worker, timeout)

    def result(self, worker: Worker, timeout: float | None = None) -> Any:
        """Wait for the result of the call that was posted."""
        remaining = self.deadline - time.monotonic()
        return worker.result(max(1.0, min(timeout or self.timeout, remaining)))

    def ask_all(
        self, workers: Sequence[Worker], call: str, *, timeout: float | None = None, **arguments: Any
    ) -> list[Any]:
        """Call several workers at once, which may need one another; their results, in the workers' order."""
        for worker in workers:
            worker.post(call, **arguments)
        results, errors = [], list[Exception]()
        for worker in workers:  # read every reply, even after a failure, so that none is taken for the next call's
            try:
                results.append(self.result(worker, timeout))
            except (Skipped, Failed) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def folder(self, nbytes: int) -> str:
        """A folder for so many bytes, in memory or else among temporary files; it is removed when the case ends.

        Raises `Skipped` where both have less free space than that.
        """
        for parent in ("/dev/shm", tempfile.gettempdir()):
            if os.path.isdir(parent) and shutil.disk_usage(parent).free > nbytes:
                return self.stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix="benchmark-"))
        raise Skipped(f"neither /dev/shm nor {tempfile.gettempdir()} has room for {nbytes / 1e9:.0f} GB")

    def shape(self, shape: str) -> str:
        """A model's shape (see `benchmarks.worker.models`), made smaller by `scale`."""
        if self.scale == 1:
            return shape
        if "/" in shape:
            size, _, count = shape.partition("/")
            return f"{_scaled(size, self.scale)}/{max(1, round(int(count) * min(1, 10 * self.scale)))}"
        if "x" in shape and shape[0].isdigit():
            count, _, size = shape.partition("x")
            return f"{max(1, round(int(count) * self.scale))}x{size}"
        kind, _, factor = shape.partition("*")
        return f"{kind}*{float(factor or 1) * self.scale:g}"


def free_port() -> int:
    """A port that is free now; another process may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scaled(size: str, scale: float) -> str:
    digits = size.rstrip("KMGiB")
    return f"{float(digits) * scale:g}{size[len(digits) :]}"
