"""Child processes for tests. They are spoken to through a pipe, and always ended.

They are forked from a process that has imported torch and done nothing else, since importing torch takes two seconds.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import psutil

PATIENCE = 60.0
"""Seconds after which a silent child is an error."""


class Child:
    """Runs `work(pipe, *args)` in a process of its own. `work` is a function at the top level of a test module."""

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tensorfork", "tensorfork.transports.zeromq", "pytest", "hypothesis"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def recv(self) -> Any:
        """The next object that the child sends; an error after `PATIENCE` seconds, or if the child has died."""
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"the child {self._process.name} sends nothing")
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join(PATIENCE)
            raise RuntimeError(f"the child died with {self._process.exitcode}") from None

    def send(self, *words: Any) -> None:
        """Send these values, as one tuple."""
        self._pipe.send(words)

    def request(self, *words: Any) -> Any:
        """Send these values, and wait for the answer."""
        self.send(*words)
        return self.recv()

    def kill(self) -> None:
        """End the child as a crash would. It is gone when this returns."""
        self._process.kill()
        self._process.join(PATIENCE)

    def stop(self) -> None:
        """Stop the child as a debugger would. It has stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    def resume(self) -> None:
        """Let the child run again after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join(PATIENCE)
        self._process.close()
        self._pipe.close()


def serve(pipe: Connection, model: Callable[[], Any], limits: dict[int, int] | None = None) -> None:
    """Publish a model, send its address, then answer requests until the pipe is closed.

    ("stats",) -> the seed's statistics; ("errors",) -> the errors that were logged; ("log",) -> all that was logged,
    from INFO on; ("update", value) -> every tensor is filled with that value under `updating`, and the new generation
    is sent; ("close",) -> the seed is closed.

    `limits` are soft resource limits to set first, by `resource.RLIMIT_*`.
    """
    import logging
    import resource

    import tensorfork

    for which, soft in (limits or {}).items():
        resource.setrlimit(which, (soft, resource.getrlimit(which)[1]))
    lines: list[str] = []
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))
            if record.levelno >= logging.ERROR:
                errors.append(lines[-1])

    logging.getLogger("tensorfork").addHandler(Handler())
    logging.getLogger("tensorfork").setLevel(logging.INFO)
    tensors = model()
    seed = tensorfork.publish(tensors)
    pipe.send(seed.address)
    while True:
        try:
            request, *args = pipe.recv()
        except EOFError:
            break
        if request == "stats":
            pipe.send(seed.stats())
        elif request == "errors":
            pipe.send(list(errors))
        elif request == "log":
            pipe.send(list(lines))
        elif request == "update":
            with seed.updating():
                for tensor in tensors.values():
                    tensor.fill_(args[0])
            pipe.send(seed.generation)
        elif request == "close":
            seed.close()
            pipe.send(None)
    seed.close()
