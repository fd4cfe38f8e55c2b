"""The seed's IPC handles, opened by threads in the background."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tensorfork.errors import TransferFailed, TransportUnavailable
from tensorfork.interpreter import ending
from tensorfork.interpreter.switch_interval import short_switch_interval
from tensorfork.memory import cuda
from tensorfork.transports.cuda_ipc.offer import RemoteAllocation

log = logging.getLogger("tensorfork")

OPENER_THREADS = 2
"""Threads that open handles: while one waits for the interpreter, the other is in the driver. Once copies are enqueued,
there is one."""
_LATE = "CUDA had not opened the seed's memory by the deadline"
CHECK_SECONDS = 0.1
"""Seconds between two checks whether a handle is still waited for."""
Check = Callable[[], object]
_Key = tuple[int, int]
"""The id of a remote region, and the ordinal of one of our GPUs."""


class RemoteHandles:
    """The addresses at which our GPUs see the seed's regions.

    Threads open the handles, those requested last first, while the caller prepares its copies and while bytes already
    move. Opening one takes 0.06 ms; then the thread needs the interpreter again, and a short switch interval lets it
    have it at once.
    """

    def __init__(self, sources: Mapping[int, RemoteAllocation]) -> None:
        self._sources = sources
        self._addresses: dict[_Key, int] = {}
        self._errors: dict[_Key, Exception] = {}
        self._queue: dict[_Key, None] = {}
        self._opening: set[_Key] = set()
        self._changed = threading.Condition()
        self._openers: list[threading.Thread] = []
        self._switch_interval = ExitStack()  # short while there are openers; `close` ends it even if one hangs
        self._max_openers, self._paused = OPENER_THREADS, False
        self._closed = False
        self._early: queue.SimpleQueue[Mapping[_Key, int] | None] = queue.SimpleQueue()
        self._closer: threading.Thread | None = None

    def request(self, keys: Iterable[_Key]) -> None:
        """Have these opened, before those that were requested earlier. Does not wait."""
        with self._changed:
            first: dict[_Key, None] = {}
            for id, device in keys:
                if (id, device) in self._addresses:
                    continue
                source = self._sources[id]
                if source.handle is None:
                    self._addresses[id, device] = source.address
                else:
                    first[id, device] = None
            for key in self._opening:
                first.pop(key, None)
            self._queue = first | self._queue
            if self._queue and not self._openers:
                for _ in range(min(self._max_openers, len(self._queue))):
                    opener = threading.Thread(target=self._run_opener, name="tensorfork-ipc-open", daemon=True)
                    opener.start()  # it waits for the condition's lock, until it is in the list
                    self._openers.append(opener)

    def wait_for_first(self, deadline: float, check: Check = lambda: None) -> None:
        """Wait until an eighth of the requested handles is open. Returns at once if none was requested.

        `check` is called while waiting, and may raise. Raises `TransportUnavailable` if one of them cannot be opened,
        `TransferFailed` at the deadline.
        """
        with self._changed:
            eighth = -(-self._count() // 8)
            in_time = self._wait_for(lambda: len(self._addresses) >= eighth or bool(self._errors), deadline, check)
            failed = next(iter(self._errors), None)
        if failed is not None:
            self.address(*failed, deadline)
        if not in_time:
            raise TransferFailed(_LATE)

    def _wait_for(self, true: Callable[[], bool], deadline: float, check: Check) -> bool:
        """Wait for something to be true, with the lock; whether it is by the deadline."""
        while not (found := self._changed.wait_for(true, max(0.0, min(CHECK_SECONDS, deadline - time.monotonic())))):
            if time.monotonic() >= deadline:
                break
            check()
        return found

    def _count(self) -> int:
        return len(self._addresses) + len(self._errors) + len(self._queue) + len(self._opening)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no thread begins to open a handle; from the first time on, one thread opens them instead of two.

        The driver does one thing at a time, and is not fair: a thread that opens one handle after another delays one
        that enqueues copies by milliseconds.
        """
        with self._changed:
            self._max_openers, self._paused = 1, True
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def is_open(self, id: int, device: int) -> bool:
        """Whether `address` would return at once."""
        return (id, device) in self._addresses

    def address(self, id: int, device: int, deadline: float, check: Check = lambda: None) -> int:
        """The address of a requested region on one of our GPUs; waits until its handle is open.

        `check` is called while waiting, and may raise. Raises `TransportUnavailable` if it cannot be opened,
        `TransferFailed` at the deadline.
        """
        key = id, device
        address = self._addresses.get(key)
        if address is not None:
            return address
        with self._changed:
            if not self._wait_for(lambda: key in self._addresses or key in self._errors, deadline, check):
                raise TransferFailed(_LATE)
            if key in self._addresses:
                return self._addresses[key]
            error = self._errors[key]
        raise TransportUnavailable(
            f"cuda_ipc: the seed's memory cannot be opened on cuda:{device}: {error}. The GPUs may not reach one "
            "another, or a container does not share the host's IPC and PID namespaces"
        ) from error

    def close_early(self, ids: Iterable[int]) -> None:
        """Have the handles of these regions closed, which no copy reads any more, on a thread. `close` waits for it."""
        wanted = set(ids)
        with self._changed:
            keys = [key for key in self._addresses if key[0] in wanted]
            addresses = {key: self._addresses.pop(key) for key in keys}
        if not addresses:
            return
        self._early.put(addresses)
        if self._closer is None:
            self._closer = threading.Thread(target=self._run_closer, name="tensorfork-ipc-close", daemon=True)
            self._closer.start()

    def close(self, deadline: float) -> None:
        """Close all handles; no copy may be in flight. One that is still being opened is closed as soon as it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._switch_interval.close()
            openers = list(self._openers)
        for opener in openers:
            opener.join(max(0.1, deadline - time.monotonic()))
        if self._closer is not None:
            self._early.put(None)
            self._closer.join()
        with self._changed:
            addresses, self._addresses = self._addresses, {}
        self._close_all(addresses)

    def _run_closer(self) -> None:
        with ending.guarded(lambda: self._early.put(None)):
            cuda.relax_capture()
            while (addresses := self._early.get()) is not None:
                self._close_all(addresses)

    def _close_all(self, addresses: Mapping[_Key, int]) -> None:
        for device in {device for _, device in addresses}:
            with cuda.current_context(device), cuda.relaxed_capture():
                for (id, on), address in addresses.items():
                    if on == device and self._sources[id].handle is not None:
                        _close(address)

    def _run_opener(self) -> None:
        """Open one requested handle after another. Runs on each of the opener threads."""
        with ending.guarded(self._stop_opening):
            self._open_requested()

    def _stop_opening(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _open_requested(self) -> None:
        cuda.relax_capture()
        with self._changed:
            if not self._closed:
                self._switch_interval.enter_context(short_switch_interval)
        key = self._next()
        with ExitStack() as context:
            current = None
            while key is not None:
                handle = self._sources[key[0]].handle
                assert handle is not None
                address, error = 0, None
                try:
                    if key[1] != current:
                        context.close()
                        current = None
                        context.enter_context(cuda.current_context(key[1]))
                        current = key[1]
                    address = cuda.open_ipc_handle(handle)
                except Exception as raised:  # by the driver, or for want of one: `address` raises it to its caller
                    error = raised
                key = self._next(key, address, error)

    def _next(self, finished: _Key | None = None, address: int = 0, error: Exception | None = None) -> _Key | None:
        """Record the result for `finished`, and return the key to open next; None if this thread is to end."""
        with self._changed:
            if finished is not None:
                self._opening.discard(finished)
                if error is not None:
                    self._errors[finished] = error
                elif self._closed:
                    _close(address)
                else:
                    self._addresses[finished] = address
                self._changed.notify_all()
            if len(self._openers) <= self._max_openers:
                self._changed.wait_for(lambda: self._closed or not self._paused)
            if self._closed or not self._queue or len(self._openers) > self._max_openers:
                if threading.current_thread() in self._openers:  # it is not if `request` was interrupted
                    self._openers.remove(threading.current_thread())
                if not self._openers:
                    self._switch_interval.close()
                return None
            key = next(iter(self._queue))
            del self._queue[key]
            self._opening.add(key)
            return key


def _close(address: int) -> None:
    try:
        cuda.close_ipc_handle(address)
    except cuda.DriverError as error:
        log.warning("a CUDA IPC handle could not be closed: %s", error)
