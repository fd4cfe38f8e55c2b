"""Child processes for tests: spoken to through a pipe, and always ended.

They are forked from a process that has imported torch and done nothing else, as importing it takes two seconds each.
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

    def hear(self) -> Any:
        """The next thing it says."""
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"the child {self._process.name} says nothing")
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join(PATIENCE)
            raise RuntimeError(f"the child died with {self._process.exitcode}") from None

    def say(self, *words: Any) -> None:
        self._pipe.send(words)

    def ask(self, *words: Any) -> Any:
        self.say(*words)
        return self.hear()

    def kill(self) -> None:
        """As a crash would; it is gone when this returns."""
        self._process.kill()
        self._process.join(PATIENCE)

    def stop(self) -> None:
        """As a debugger would; it has stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    def go_on(self) -> None:
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
    """Publish a model; say the address; then answer what is asked, until told to end.

    ("stats",) -> its statistics; ("errors",) -> what it logged as an error; ("update", value) -> every tensor is filled
    with that value, under `updating`; ("close",) -> closes the seed.
    """
    import logging
    import resource

    import tensorfork

    for which, soft in (limits or {}).items():
        resource.setrlimit(which, (soft, resource.getrlimit(which)[1]))
    errors: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(self.format(record))

    logging.getLogger("tensorfork").addHandler(Keep(logging.ERROR))
    tensors = model()
    seed = tensorfork.publish(tensors)
    pipe.send(seed.address)
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            break
        if what == "stats":
            pipe.send(seed.stats())
        elif what == "errors":
            pipe.send(list(errors))
        elif what == "update":
            with seed.updating():
                for tensor in tensors.values():
                    tensor.fill_(args[0])
            pipe.send(seed.generation)
        elif what == "close":
            seed.close()
            pipe.send(None)
    seed.close()
