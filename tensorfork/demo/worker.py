"""What runs in the demo's processes: `python -m tensorfork.demo.worker`; see `processes` for how it is spoken to.

The same program is seed and fork: what it is depends on what it is asked to do.
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tensorfork
from tensorfork.demo import page_cache, subjects
from tensorfork.demo.failure import DemoFailed

GRACE = 2.0
"""Seconds that what is under way gets when the demo itself has gone."""
EVERY = 0.05
"""Seconds between two words on the progress."""


class Worker:
    """Does what it is asked. Each public method is one thing it can be asked for, and returns what JSON can carry."""

    def __init__(self, say: Any) -> None:
        self._say = say
        self._subject: Any = None
        self._model: Any = None
        self._seed: tensorfork.Seed | None = None

    def load(self, subject: dict[str, Any]) -> dict[str, Any]:
        """The seed: get the model with its weights."""
        self._subject = subjects.make(subject)
        since = time.perf_counter()
        self._model = self._subject.load()
        spent = time.perf_counter() - since
        return {"seconds": spent, "dtype": str(_dtype(self._model)).removeprefix("torch.")}

    def publish(self) -> dict[str, Any]:
        """The seed: let it be forked."""
        since = time.perf_counter()
        self._seed = tensorfork.publish(self._model)
        spent = time.perf_counter() - since
        layout = self._seed.layout
        return {
            "address": self._seed.address,
            "seconds": spent,
            "tensors": len(layout.tensors),
            "nbytes": layout.nbytes,
        }

    def build(self, subject: dict[str, Any]) -> dict[str, Any]:
        """The fork: get the model without its weights."""
        self._subject = subjects.make(subject)
        since = time.perf_counter()
        self._model = self._subject.build()
        spent = time.perf_counter() - since
        held = [t for t in subjects.tensors(self._model) if not t.is_meta]
        return {"seconds": spent, "held": sum(t.nbytes for t in held)}

    def fork(self, address: str, transport: str, timeout: float, verify: bool) -> dict[str, Any]:
        """The fork: get the weights from the seed."""
        last = 0.0

        def progress(moved: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if moved in (0, total) or now - last >= EVERY:
                last = now
                self._say({"progress": [moved, total]})

        report = tensorfork.fork_into(
            self._model, address, transport=transport, timeout=timeout, verify=verify, progress=progress
        )
        told = ("transport", "fabric", "tensors", "nbytes", "verified", "total")
        return {name: getattr(report, name) for name in told} | {"seconds": dict(report.seconds)}

    def compute(self, into: str) -> dict[str, Any]:
        """Run the model on the inputs of its kind; every number that comes out goes into a file."""
        since = time.perf_counter()
        outcome = self._subject.compute(self._model)
        spent = time.perf_counter() - since
        subjects.save({name: t.contiguous().clone() for name, t in outcome.outputs.items()}, Path(into))
        return {
            "seconds": spent,
            "inputs": outcome.inputs,
            "kind": outcome.kind,
            "shape": outcome.shape,
            "similarities": outcome.similarities,
            "numbers": sum(t.numel() for t in outcome.outputs.values()),
        }

    def save(self, path: str) -> dict[str, Any]:
        """The seed: write the model to a file."""
        since = time.perf_counter()
        subjects.save(self._model.state_dict(), Path(path))
        return {"seconds": time.perf_counter() - since}

    def read(self, paths: list[str]) -> dict[str, Any]:
        """The fork: every byte of these files into memory of its own, for comparison."""
        files = [Path(path) for path in paths]
        warm = page_cache.resident(files)
        since = time.perf_counter()
        found = [subjects.load_file(path) for path in files]
        kept = [torch.empty_like(tensor).copy_(tensor) for tensors in found for tensor in tensors.values()]
        spent = time.perf_counter() - since
        return {"seconds": spent, "nbytes": sum(t.nbytes for t in kept), "warm": warm}

    def drop(self) -> dict[str, Any]:
        """Let go of the model, and end what runs."""
        if self._seed is not None:
            self._seed.close()
        self._seed = self._model = None
        return {}


def main() -> None:
    """Do what standard input says, until it ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(what: dict[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")

    worker = Worker(say)
    finished = threading.Event()
    for command in _commands(finished):
        do = command.pop("do")
        try:
            say({"answer": getattr(worker, do)(**command)})
        except BrokenPipeError:
            break
        except (tensorfork.TensorForkError, DemoFailed) as error:
            say({"failed": str(error) if isinstance(error, DemoFailed) else f"{type(error).__name__}: {error}"})
        except Exception:
            say({"failed": traceback.format_exc()})
    worker.drop()
    finished.set()


def _commands(finished: threading.Event) -> Iterator[dict[str, Any]]:
    """The commands, one by one. When they end, so does this process, soon, whatever it is doing."""
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            heard.put(line)
        heard.put(None)
        if not finished.wait(GRACE):
            os._exit(1)

    threading.Thread(target=listen, name="demo-commands", daemon=True).start()
    while (line := heard.get()) is not None:
        yield json.loads(line)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)


if __name__ == "__main__":
    main()
