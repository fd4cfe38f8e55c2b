"""Handles, opened on a thread of their own."""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from tensorfork import cuda
from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.threads import short_turns
from tensorfork.transports.cuda_ipc.offer import Source

log = logging.getLogger("tensorfork")

_Pair = tuple[int, int]
"""A remote region's id, and one of our GPUs."""


class Mapped:
    """The seed's memory, as our GPUs see it. A thread opens the handles in the order in which they are wanted, while
    whoever wants them draws up plans, and while bytes move already: a call of 0.06 ms each, after which it wants the
    interpreter again, and gets it at once.
    """

    def __init__(self, sources: Mapping[int, Source]) -> None:
        self._sources = sources
        self._found: dict[_Pair, int] = {}
        self._failed: dict[_Pair, Exception] = {}
        self._wanted: dict[_Pair, None] = {}
        self._changed = threading.Condition()
        self._opener: threading.Thread | None = None
        self._turns = ExitStack()  # with the opener, but for one that hangs
        self._closed = False

    def want(self, pairs: Iterable[_Pair]) -> None:
        """Have these opened, before those that were wanted earlier."""
        with self._changed:
            first: dict[_Pair, None] = {}
            for id, device in pairs:
                if (id, device) in self._found:
                    continue
                source = self._sources[id]
                if source.handle is None:
                    self._found[id, device] = source.address
                else:
                    first[id, device] = None
            self._wanted = first | self._wanted
            if self._wanted and self._opener is None:
                self._turns.enter_context(short_turns)
                self._opener = threading.Thread(target=self._open, name="tensorfork-ipc-open", daemon=True)
                self._opener.start()

    def first(self, deadline: float) -> None:
        """Wait until one is open, if any is wanted; raises as `address` does for the first that failed."""
        with self._changed:
            pair = None if self._found else next(iter([*self._failed, *self._wanted]), None)
        if pair is not None:
            self.address(*pair, deadline)

    def is_open(self, id: int, device: int) -> bool:
        """Whether `address` has nothing to wait for."""
        return (id, device) in self._found

    def address(self, id: int, device: int, deadline: float) -> int:
        """Where one that is wanted is; waits for it.

        Raises `TransportUnavailable` where it cannot be opened, `TransferFailed` at the deadline.
        """
        pair = id, device
        address = self._found.get(pair)
        if address is not None:
            return address
        with self._changed:
            over = self._changed.wait_for(
                lambda: pair in self._found or pair in self._failed, max(0.0, deadline - time.monotonic())
            )
            if not over:
                raise TransferFailed("CUDA had not opened the seed's memory by the deadline")
            if pair in self._found:
                return self._found[pair]
            error = self._failed[pair]
        raise TransportUnavailable(
            f"cuda_ipc: the seed's memory cannot be opened on cuda:{device}: {error}. The GPUs may not reach one "
            "another, or a container does not share the host's IPC and PID namespaces"
        ) from error

    def close(self, deadline: float) -> None:
        """Close all of them; nothing may be reading any more. One that is still being opened is closed when it is."""
        with self._changed:
            self._closed = True
            self._turns.close()
            opener = self._opener
        if opener is not None:
            opener.join(max(0.1, deadline - time.monotonic()))
        with self._changed:
            found, self._found = self._found, {}
        for device in {device for _, device in found}:
            with cuda.current(device), cuda.relaxed_capture():
                for (id, on), address in found.items():
                    if on == device and self._sources[id].handle is not None:
                        _close(address)

    def _open(self) -> None:
        cuda.relax_capture()
        pair = self._next()
        with ExitStack() as entered:
            on = None
            while pair is not None:
                handle = self._sources[pair[0]].handle
                assert handle is not None
                address, error = 0, None
                try:
                    if pair[1] != on:
                        entered.close()
                        entered.enter_context(cuda.current(pair[1]))
                        on = pair[1]
                    address = cuda.open_handle(handle)
                except Exception as failed:  # of the driver, or of its absence: for who asks
                    error = failed
                pair = self._next(pair, address, error)

    def _next(self, over: _Pair | None = None, address: int = 0, error: Exception | None = None) -> _Pair | None:
        """Note what became of one, and say which is wanted first; None when the thread is to end."""
        with self._changed:
            if over is not None:
                if error is not None:
                    self._failed[over] = error
                elif self._closed:
                    _close(address)
                else:
                    self._found[over] = address
                self._wanted.pop(over, None)  # wherever it stands by now
                self._changed.notify_all()
            if self._closed or not self._wanted:
                self._opener = None
                self._turns.close()
                return None
            return next(iter(self._wanted))


def _close(address: int) -> None:
    try:
        cuda.close_handle(address)
    except cuda.DriverError as error:
        log.warning("a CUDA IPC handle could not be closed: %s", error)
