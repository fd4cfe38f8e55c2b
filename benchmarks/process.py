"""Workers: the subprocesses that measure, as the process that asks sees them."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
STACKS = 2.0
"""Seconds a worker that hangs gets to print the stacks of its threads."""


class Skipped(Exception):
    """It cannot be measured here; the message says why."""


class Failed(Exception):
    """The worker raised, and lives."""


class Lost(Exception):
    """The worker died, or hung and was killed; the message has the end of what it printed."""


class Worker:
    """A subprocess that does what it is asked, one call at a time. Nothing of it is left after `close`.

    A call is the name of a function in `benchmarks.worker`, such as ``sides.publish``, and its keyword arguments.
    """

    def __init__(self, name: str, *, device: str = "cpu", env: Mapping[str, str] | None = None) -> None:
        self.name, self.device = name, device
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self._socket, theirs = socket.socketpair()
        self._received = b""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno()), name, device],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **(env or {}), "PYTHONPATH": path},
            )

    def ask(self, call: str, *, timeout: float, **arguments: Any) -> Any:
        """Have it done, and wait for the result."""
        self.post(call, **arguments)
        return self.result(timeout)

    def post(self, call: str, **arguments: Any) -> None:
        """Have it done, and go on; `result` takes the result."""
        try:
            self._socket.sendall(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise Lost(f"the worker {self.name} died: {self._printed()}") from error

    def result(self, timeout: float) -> Any:
        """What the call before returned.

        Raises `Skipped` or `Failed` where it raised, and `Lost` where it died, or took more than `timeout` seconds.
        """
        reply = json.loads(self._line(time.monotonic() + timeout, timeout))
        if "skipped" in reply:
            raise Skipped(reply["skipped"])
        if "failed" in reply:
            raise Failed(f"{self.name}: {reply['failed']}")
        return reply["value"]

    def close(self) -> None:
        """End it, if need be by force."""
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._process.kill()  # interrupted: it may be in the middle of a call
        self.close()

    def _line(self, deadline: float, timeout: float) -> bytes:
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Lost(f"the worker {self.name} hung for {timeout:g} s and was killed:\n{self._stacks()}")
            try:
                data = self._socket.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                self._process.wait(5)
                raise Lost(f"the worker {self.name} died with {self._process.returncode}:\n{self._printed()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _stacks(self) -> str:
        """Have it print its stacks, and kill it."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS)
        self._process.kill()
        self._process.wait()
        return self._printed()

    def _printed(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 8000))
        return self._log.read().decode(errors="replace").strip()
