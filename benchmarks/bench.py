"""What a case is given: the options, the devices, and workers that end with it."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.process import Failed, Skipped, Worker

START = 120.0
"""Seconds a worker may take to import everything and make a CUDA context."""


@dataclass
class Bench:
    """One case's surroundings.

    Attributes:
        machine: what `benchmarks.worker.machine` said of it.
        rounds: how often everything is measured.
        cold: how many fresh processes fork once, for each kind of cold fork.
        seconds: how long steps are timed in each phase of a disturbance case.
        scale: factor for the size of every model; 1 for figures that count.
        timeout: seconds that any one call may take.
        isolate: whether the seed and the fork each see one GPU only.
        on_gpu: whether the case's models are on GPUs.
        deadline: when the case ends in any event (monotonic).
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
        """How many there are."""
        return len(self.machine["gpus"])

    @property
    def source(self) -> str:
        """The seed's device, by its number among all."""
        return "cuda:0" if self.on_gpu else "cpu"

    @property
    def sink(self) -> str:
        """The fork's device: another GPU than the seed's, where there is one."""
        return f"cuda:{min(1, self.gpus - 1)}" if self.on_gpu else "cpu"

    def start(self, name: str, device: str, *, alone: bool = False) -> Worker:
        """A worker that lives until the case ends, or until it is closed.

        `alone`: with `isolate`, it sees no GPU but its own, which is then cuda:0 to it.
        """
        env = {}
        if self.isolate and alone and device.startswith("cuda"):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = int(device.partition(":")[2])
            env["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[index] else str(index)
            device = "cuda:0"
        return self.stack.enter_context(Worker(name, device=device, env=env))

    def ask(self, worker: Worker, call: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """Ask, with the usual timeout, and never beyond the case's deadline."""
        worker.post(call, **arguments)
        return self.result(worker, timeout)

    def result(self, worker: Worker, timeout: float | None = None) -> Any:
        """The result of what was posted."""
        left = self.deadline - time.monotonic()
        return worker.result(max(1.0, min(timeout or self.timeout, left)))

    def all(self, workers: Sequence[Worker], call: str, *, timeout: float | None = None, **arguments: Any) -> list[Any]:
        """Ask several at once, each of which may need the others; their results."""
        for worker in workers:
            worker.post(call, **arguments)
        results, errors = [], list[Exception]()
        for worker in workers:  # each is heard, also when another failed: the next answer is to be the next call's
            try:
                results.append(self.result(worker, timeout))
            except (Skipped, Failed) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def folder(self, room: int) -> str:
        """A folder that is removed when the case ends: in memory, or else where temporary files go.

        Raises `Skipped` where neither has room for so many bytes.
        """
        for inside in ("/dev/shm", tempfile.gettempdir()):
            if os.path.isdir(inside) and shutil.disk_usage(inside).free > room:
                return self.stack.enter_context(tempfile.TemporaryDirectory(dir=inside, prefix="benchmark-"))
        raise Skipped(f"neither /dev/shm nor {tempfile.gettempdir()} has room for {room / 1e9:.0f} GB")

    def shape(self, word: str) -> str:
        """A model's shape, at this run's scale."""
        if self.scale == 1:
            return word
        if "/" in word:
            size, _, count = word.partition("/")
            return f"{_scaled(size, self.scale)}/{max(1, round(int(count) * min(1, 10 * self.scale)))}"
        if "x" in word and word[0].isdigit():
            count, _, size = word.partition("x")
            return f"{max(1, round(int(count) * self.scale))}x{size}"
        kind, _, factor = word.partition("*")
        return f"{kind}*{float(factor or 1) * self.scale:g}"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scaled(size: str, scale: float) -> str:
    digits = size.rstrip("KMGiB")
    return f"{float(digits) * scale:g}{size[len(digits) :]}"
