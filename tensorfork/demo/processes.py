"""The demo's processes: started, called, and never left behind.

A worker reads commands, one JSON object a line, from its standard input, and writes its replies to its standard output.
What its libraries print goes to a file, of which the end is shown when the worker dies. Each worker is in a session of
its own, so that Ctrl-C reaches only this process. A worker exits when its standard input is closed, so it does not
outlive this process, however this one ends.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorfork.demo.failure import DemoFailed

EXIT_SECONDS = 10.0
"""Seconds that a worker gets to exit before it is killed."""
MARGIN = 5.0
"""Seconds that a reply may take beyond the timeout: a command with a deadline of its own is to report that itself."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}


class WorkerProcess:
    """One worker.

    Attributes:
        name: what messages call it, such as "the seed".
        pid: its process id.
    """

    def __init__(self, name: str, folder: Path, timeout: float) -> None:
        self.name, self._timeout = name, timeout
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tensorfork.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=folder,
            env=os.environ | _ENVIRONMENT | {"TMPDIR": str(folder)},
            start_new_session=True,
        )
        self._received = b""
        self.pid = self._process.pid

    def call(
        self, command: str, progress: Callable[[int, int], None] | None = None, **arguments: Any
    ) -> Mapping[str, Any]:
        """Have the worker run one of its commands, and wait for the result.

        Raises `DemoFailed`, with the worker's message, when the command fails, the worker dies, or it takes longer than
        the timeout.
        """
        line = json.dumps({"command": command, **arguments}).encode() + b"\n"
        try:
            os.write(_fileno(self._process.stdin), line)
        except BrokenPipeError:
            raise DemoFailed(self._cause_of_death()) from None
        deadline = time.monotonic() + self._timeout + MARGIN
        while True:
            reply = json.loads(self._read_line(deadline, command))
            if "progress" in reply:
                if progress is not None:
                    progress(*reply["progress"])
            elif "error" in reply:
                raise DemoFailed(f"{self.name} could not {command}: {reply['error']}")
            else:
                result: Mapping[str, Any] = reply["result"]
                return result

    @property
    def status(self) -> int | None:
        """The exit status; None while the worker runs."""
        return self._process.poll()

    def close(self) -> None:
        """Have the worker exit; kill it where it does not."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close_files()

    def kill(self) -> None:
        """Kill the worker."""
        self._process.kill()
        self._process.wait()
        self._close_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _read_line(self, deadline: float, command: str) -> bytes:
        out = _fileno(self._process.stdout)
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([out], [], [], remaining)[0]:
                raise DemoFailed(
                    f"{self.name} took more than {self._timeout:g} s to {command}; give it more with --timeout"
                )
            data = os.read(out, 1 << 16)
            if not data:
                raise DemoFailed(self._cause_of_death())
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _cause_of_death(self) -> str:
        """How the process ended, and the last lines that it printed."""
        status = self._process.wait()
        self._stderr.seek(0)
        printed = self._stderr.read().decode(errors="replace").strip().splitlines()[-20:]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return "\n".join([f"{self.name} (process {self.pid}) {how}", *printed])

    def _close_files(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            if file is not None:
                file.close()


def _fileno(pipe: Any) -> int:
    number: int = pipe.fileno()
    return number
