"""Workers: the subprocesses that measure, as the process that calls them sees them."""

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
STACK_SECONDS = 2.0
"""Seconds that a worker that hangs gets to print the stacks of its threads."""


class Skipped(Exception):
    """This machine cannot measure it; the message says why."""


class Failed(Exception):
    """The call raised an error; the worker goes on."""


class Lost(Exception):
    """The worker died, or hung and was killed; the message has the end of its output."""


class Worker:
    """A subprocess that runs one call at a time. `close` leaves nothing of it behind.

    A call is the name of a function in `benchmarks.worker`, such as ``api.publish``, and its keyword arguments.
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
        """Run a call and wait for its result; see `result` for what is raised."""
        self.post(call, **arguments)
        return self.result(timeout)

    def post(self, call: str, **arguments: Any) -> None:
        """Begin a call without waiting; `result` waits for it."""
        try:
            self._socket.sendall(json.dumps({"call": call, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise Lost(f"the worker {self.name} died: {self._output()}") from error

    def result(self, timeout: float) -> Any:
        """Wait for what the posted call returns.

        Raises `Skipped` or `Failed` where the call raised, and `Lost` where the worker died or took more than `timeout`
        seconds; it is killed then.
        """
        reply = json.loads(self._read_line(time.monotonic() + timeout, timeout))
        if "skipped" in reply:
            raise Skipped(reply["skipped"])
        if "failed" in reply:
            raise Failed(f"{self.name}: {reply['failed']}")
        return reply["value"]

    def close(self) -> None:
        """Have the worker exit; kill it where it does not."""
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
            self._process.kill()  # this process is interrupted, and the worker may be busy with a call
        self.close()

    def _read_line(self, deadline: float, timeout: float) -> bytes:
        while b"\n" not in self._received:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Lost(f"the worker {self.name} hung for {timeout:g} s and was killed:\n{self._kill_with_stacks()}")
            try:
                data = self._socket.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                self._process.wait(5)
                raise Lost(f"the worker {self.name} died with {self._process.returncode}:\n{self._output()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _kill_with_stacks(self) -> str:
        """Have the worker print its stacks, kill it, and return its output."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(STACK_SECONDS)
        self._process.kill()
        self._process.wait()
        return self._output()

    def _output(self) -> str:
        """The end of what the worker has printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 8000))
        return self._log.read().decode(errors="replace").strip()
