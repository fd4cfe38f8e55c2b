"""The demo's processes: started, asked, and never left behind.

A worker is told what to do by lines of JSON on its standard input, and answers by lines on its standard output; what
its libraries print goes to a file, and is shown when it fails. It is a session of its own, so that Ctrl-C reaches this
process alone; it ends when its standard input does, so that it cannot outlive us, however we end.
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

ENDING = 10.0
"""Seconds that a worker gets to end by itself."""
MARGIN = 5.0
"""Seconds that an answer may take beyond the timeout: what has a deadline of its own is to say so itself."""
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}


class Worker:
    """One process.

    Attributes:
        name: what it is called, as in "the seed".
        pid: its process id.
    """

    def __init__(self, name: str, folder: Path, timeout: float) -> None:
        self.name, self._timeout = name, timeout
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tensorfork.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=folder,
            env=os.environ | _ENVIRONMENT | {"TMPDIR": str(folder)},
            start_new_session=True,
        )
        self._rest = b""
        self.pid = self._process.pid

    def ask(self, do: str, progress: Callable[[int, int], None] | None = None, **arguments: Any) -> Mapping[str, Any]:
        """Have it do something, and wait for the outcome.

        Raises `DemoFailed` with what it said, when it fails, dies, or takes longer than the timeout.
        """
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        try:
            os.write(_number(self._process.stdin), line)
        except BrokenPipeError:
            raise DemoFailed(self._obituary()) from None
        deadline = time.monotonic() + self._timeout + MARGIN
        while True:
            said = json.loads(self._line(deadline, do))
            if "progress" in said:
                if progress is not None:
                    progress(*said["progress"])
            elif "failed" in said:
                raise DemoFailed(f"{self.name} could not {do}: {said['failed']}")
            else:
                answer: Mapping[str, Any] = said["answer"]
                return answer

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.poll()

    def end(self) -> None:
        """Let it end by itself, and kill it if it does not."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        else:
            self.kill()

    def _line(self, deadline: float, do: str) -> bytes:
        out = _number(self._process.stdout)
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise DemoFailed(f"{self.name} took more than {self._timeout:g} s to {do}; give it more with --timeout")
            got = os.read(out, 1 << 16)
            if not got:
                raise DemoFailed(self._obituary())
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _obituary(self) -> str:
        status = self._process.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-20:]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return "\n".join([f"{self.name} (process {self.pid}) {how}", *last])

    def _close(self) -> None:
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                file.close()


def _number(pipe: Any) -> int:
    number: int = pipe.fileno()
    return number
