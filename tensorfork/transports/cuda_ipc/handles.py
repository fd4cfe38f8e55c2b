"""Handles, opened on a thread of their own."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter.switch_interval import short_switch_interval
from tensorfork.memory import cuda
from tensorfork.transports.cuda_ipc.offer import RemoteAllocation

log = logging.getLogger("tensorfork")

OPENERS = 2
"""Threads: while one waits for the interpreter, the other's call is with the driver. Beside copies there is one."""
LATE = "CUDA had not opened the seed's memory by the deadline"
_Pair = tuple[int, int]
"""A remote region's id, and one of our GPUs."""


class RemoteHandles:
    """The seed's memory, as our GPUs see it. Threads open the handles in the order in which they are wanted, while
    whoever wants them draws up plans, and while bytes move already: calls of 0.06 ms each, after which a thread wants
    the interpreter again, and gets it at once.
    """

    def __init__(self, sources: Mapping[int, RemoteAllocation]) -> None:
        self._sources = sources
        self._found: dict[_Pair, int] = {}
        self._failed: dict[_Pair, Exception] = {}
        self._wanted: dict[_Pair, None] = {}
        self._under_way: set[_Pair] = set()
        self._changed = threading.Condition()
        self._openers: list[threading.Thread] = []
        self._turns = ExitStack()  # with the openers, but for one that hangs
        self._most, self._paused = OPENERS, False
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
            for pair in self._under_way:
                first.pop(pair, None)
            self._wanted = first | self._wanted
            if self._wanted and not self._openers:
                for _ in range(min(self._most, len(self._wanted))):
                    opener = threading.Thread(target=self._open, name="tensorfork-ipc-open", daemon=True)
                    opener.start()  # and waits until it is known
                    self._openers.append(opener)

    def enough(self, deadline: float) -> None:
        """Wait until an eighth of what is wanted is open, if anything is; raises as `address` does for the first that
        failed.
        """
        with self._changed:
            eighth = -(-self._count() // 8)
            over = self._changed.wait_for(
                lambda: len(self._found) >= eighth or self._failed, max(0.0, deadline - time.monotonic())
            )
            failed = next(iter(self._failed), None)
        if failed is not None:
            self.address(*failed, deadline)
        if not over:
            raise TransferFailed(LATE)

    def _count(self) -> int:
        return len(self._found) + len(self._failed) + len(self._wanted) + len(self._under_way)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, no handle begins to be opened. The driver does one thing at a time, and is not fair: who opens one
        handle after another keeps who wants to enqueue copies waiting for milliseconds.
        """
        with self._changed:
            self._most, self._paused = 1, True
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

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
                raise TransferFailed(LATE)
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
            self._changed.notify_all()
            self._turns.close()
            openers = list(self._openers)
        for opener in openers:
            opener.join(max(0.1, deadline - time.monotonic()))
        with self._changed:
            found, self._found = self._found, {}
        for device in {device for _, device in found}:
            with cuda.current_context(device), cuda.relaxed_capture():
                for (id, on), address in found.items():
                    if on == device and self._sources[id].handle is not None:
                        _close(address)

    def _open(self) -> None:
        cuda.relax_capture()
        with self._changed:
            if not self._closed:
                self._turns.enter_context(short_switch_interval)
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
                        on = None
                        entered.enter_context(cuda.current_context(pair[1]))
                        on = pair[1]
                    address = cuda.open_ipc_handle(handle)
                except Exception as failed:  # of the driver, or of its absence: for who asks
                    error = failed
                pair = self._next(pair, address, error)

    def _next(self, over: _Pair | None = None, address: int = 0, error: Exception | None = None) -> _Pair | None:
        """Note what became of one, and say which is wanted first; None when the thread is to end."""
        with self._changed:
            if over is not None:
                self._under_way.discard(over)
                if error is not None:
                    self._failed[over] = error
                elif self._closed:
                    _close(address)
                else:
                    self._found[over] = address
                self._changed.notify_all()
            if len(self._openers) <= self._most:
                self._changed.wait_for(lambda: self._closed or not self._paused)
            if self._closed or not self._wanted or len(self._openers) > self._most:
                if threading.current_thread() in self._openers:  # else who started it was interrupted
                    self._openers.remove(threading.current_thread())
                if not self._openers:
                    self._turns.close()
                return None
            pair = next(iter(self._wanted))
            del self._wanted[pair]
            self._under_way.add(pair)
            return pair


def _close(address: int) -> None:
    try:
        cuda.close_ipc_handle(address)
    except cuda.DriverError as error:
        log.warning("a CUDA IPC handle could not be closed: %s", error)
