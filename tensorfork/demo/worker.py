"""What runs in the demo's processes: `python -m tensorfork.demo.worker`; `processes` describes the protocol.

The same program is seed and fork: the commands that it gets decide which.
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
from tensorfork.demo import models, page_cache
from tensorfork.demo.failure import DemoFailed

EXIT_GRACE = 2.0
"""Seconds that the running command gets to end after standard input was closed."""
PROGRESS_INTERVAL = 0.05
"""Seconds between two reports of a fork's progress."""


class Worker:
    """The commands. Each public method is one: it takes and returns values that JSON can carry."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._source: Any = None
        self._model: Any = None
        self._seed: tensorfork.Seed | None = None

    def load(self, model: dict[str, Any]) -> dict[str, Any]:
        """In the seed: load the model with its weights."""
        self._source = models.from_description(model)
        start = time.perf_counter()
        self._model = self._source.load()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "dtype": str(_dtype(self._model)).removeprefix("torch.")}

    def publish(self) -> dict[str, Any]:
        """In the seed: publish the model."""
        start = time.perf_counter()
        self._seed = tensorfork.publish(self._model)
        seconds = time.perf_counter() - start
        layout = self._seed.layout
        return {
            "address": self._seed.address,
            "seconds": seconds,
            "tensors": len(layout.tensors),
            "nbytes": layout.nbytes,
        }

    def build(self, model: dict[str, Any]) -> dict[str, Any]:
        """In the fork: build the model without its weights."""
        self._source = models.from_description(model)
        start = time.perf_counter()
        self._model = self._source.build()
        seconds = time.perf_counter() - start
        allocated = [tensor for tensor in models.tensors(self._model) if not tensor.is_meta]
        return {"seconds": seconds, "allocated": sum(tensor.nbytes for tensor in allocated)}

    def fork(self, address: str, transport: str, timeout: float, verify: bool) -> dict[str, Any]:
        """In the fork: copy the weights from the seed."""
        last = 0.0

        def progress(moved: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if moved in (0, total) or now - last >= PROGRESS_INTERVAL:
                last = now
                self._send({"progress": [moved, total]})

        report = tensorfork.fork_into(
            self._model, address, transport=transport, timeout=timeout, verify=verify, progress=progress
        )
        fields = ("transport", "fabric", "tensors", "nbytes", "verified", "total")
        return {name: getattr(report, name) for name in fields} | {"seconds": dict(report.seconds)}

    def compute(self, file: str) -> dict[str, Any]:
        """Run the model on inputs of its kind, and write every output tensor to a file."""
        start = time.perf_counter()
        computed = self._source.compute(self._model)
        seconds = time.perf_counter() - start
        models.save({name: t.contiguous().clone() for name, t in computed.outputs.items()}, Path(file))
        return {
            "seconds": seconds,
            "inputs": computed.inputs,
            "kind": computed.kind,
            "shape": computed.shape,
            "similarities": computed.similarities,
            "numbers": sum(t.numel() for t in computed.outputs.values()),
        }

    def save(self, file: str) -> dict[str, Any]:
        """In the seed: write the model to a file."""
        start = time.perf_counter()
        models.save(self._model.state_dict(), Path(file))
        return {"seconds": time.perf_counter() - start}

    def read(self, files: list[str]) -> dict[str, Any]:
        """In the fork: read every byte of these files into memory of this process, for comparison."""
        paths = [Path(file) for file in files]
        cached = page_cache.resident(paths)
        start = time.perf_counter()
        mapped = [models.load_file(path) for path in paths]
        copies = [torch.empty_like(tensor).copy_(tensor) for named in mapped for tensor in named.values()]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "nbytes": sum(t.nbytes for t in copies), "cached": cached}

    def drop(self) -> dict[str, Any]:
        """Close the seed, if there is one, and release the model."""
        if self._seed is not None:
            self._seed.close()
        self._seed = self._model = None
        return {}


def main() -> None:
    """Run the commands from standard input until it is closed."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the replies

    def send(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")

    worker = Worker(send)
    finished = threading.Event()
    for arguments in _commands(finished):
        command = arguments.pop("command")
        try:
            send({"result": getattr(worker, command)(**arguments)})
        except BrokenPipeError:
            break
        except (tensorfork.TensorForkError, DemoFailed) as error:
            send({"error": str(error) if isinstance(error, DemoFailed) else f"{type(error).__name__}: {error}"})
        except Exception:
            send({"error": traceback.format_exc()})
    worker.drop()
    finished.set()


def _commands(finished: threading.Event) -> Iterator[dict[str, Any]]:
    """The commands, one by one, until standard input is closed.

    Unless `finished` is set within `EXIT_GRACE` seconds after that, the process exits, whatever it is doing.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read_stdin() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        if not finished.wait(EXIT_GRACE):
            os._exit(1)

    threading.Thread(target=read_stdin, name="demo-stdin", daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)


if __name__ == "__main__":
    main()
