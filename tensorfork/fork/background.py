"""A call on a thread of its own, while the caller does something else."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from tensorfork.interpreter import ending

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Begins at once. `result` waits for it, and raises what it raised; `wait` only waits."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the call has ended."""
        self._thread.join()

    def result(self) -> T:
        """What the call returned."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            with ending.guarded():
                self._value = self._call()
        except BaseException as error:  # raised by `result`
            self._error = error
