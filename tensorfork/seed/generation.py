"""The generation of a seed's tensors: a seqlock, over their values and over which tensors there are.

A writer makes the generation odd before its first change and even again, by adding one more, after its last. A reader
takes the generation before and after it reads: it has read the bytes of one moment only if the two are equal and even.
Nobody ever waits for anybody.
"""

import threading
from collections.abc import Callable

Commit = Callable[[], None]


class SeqLock:
    """A seqlock around a model. Writers call `enter` and `leave`; readers compare `generation` before and after.

    Writers may overlap: the last to leave makes the generation even.

    Args:
        settle: called when the last writer leaves, without a lock, with whether only values have changed. It looks at
            the model, and returns what makes the result valid, which is called just before the generation becomes
            even; or not at all, where another writer came meanwhile. What it raises reaches the writer.
    """

    def __init__(self, settle: Callable[[bool], Commit]) -> None:
        self.generation = 0
        self.failed: str | None = None
        """Why the generation stays odd although nobody is writing: what the last change raised."""
        self._settle = settle
        self._lock = threading.Lock()
        self._writers = 0
        self._entered = 0
        self._values_only = True

    def enter(self, values_only: bool = False) -> None:
        """Begin a change."""
        with self._lock:
            self._writers += 1
            self._entered += 1
            self._values_only = self._values_only and values_only
            if self.generation % 2 == 0:
                self.generation += 1
            if self._writers == 1 and self.failed is not None:
                self.failed, self._values_only = None, False  # what was left of the last change is looked at as well

    def leave(self, error: BaseException | None = None) -> None:
        """End a change that was begun, with the error that it raised, if any.

        The generation stays odd after a change that raised, in the seed's code or in the caller's, until a later one
        succeeds.
        """
        with self._lock:
            self._writers -= 1
            if error is not None:
                self.failed = f"{type(error).__name__}: {error}"[:1000]
            if self._writers or self.failed is not None:
                return
            entered, values_only = self._entered, self._values_only
        try:
            commit = self._settle(values_only)
        except BaseException as raised:
            with self._lock:
                if entered == self._entered:
                    self.failed = f"{type(raised).__name__}: {raised}"[:1000]
            raise
        with self._lock:
            if entered == self._entered:
                commit()
                self._values_only = True
                self.generation += 1
