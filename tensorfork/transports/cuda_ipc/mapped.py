"""Handles, opened on a thread of their own."""

import threading
from collections.abc import Iterable, Mapping

from tensorfork import cuda
from tensorfork.errors import TransportUnavailable
from tensorfork.transports.cuda_ipc.offer import Source


class Mapped:
    """The seed's memory, as our GPUs see it. A thread opens the handles in the order in which they are wanted, while
    whoever wants them draws up plans, and while bytes move already.
    """

    def __init__(self, sources: Mapping[int, Source]) -> None:
        self._sources = sources
        self._found: dict[tuple[int, int], int] = {}
        self._wanted: dict[tuple[int, int], None] = {}
        self._changed = threading.Condition()
        self._opener: threading.Thread | None = None
        self._error: Exception | None = None
        self._closed = False

    def want(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Have these remote regions opened, each for one of our GPUs, before those that were wanted earlier."""
        with self._changed:
            first: dict[tuple[int, int], None] = {}
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
                self._opener = threading.Thread(target=self._open, name="tensorfork-ipc-open", daemon=True)
                self._opener.start()

    def address(self, id: int, device: int) -> int:
        """Where one that is wanted is; waits for it. Raises `TransportUnavailable`."""
        address = self._found.get((id, device))
        if address is None:
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None or (id, device) in self._found)
            if (id, device) not in self._found:
                raise TransportUnavailable(
                    f"cuda_ipc: the seed's memory cannot be opened on cuda:{device}: {self._error}. The GPUs may not "
                    "reach one another, or a container does not share the host's IPC and PID namespaces"
                ) from self._error
            address = self._found[id, device]
        return address

    def close(self) -> None:
        """Close all of them; nothing may be reading any more."""
        with self._changed:
            self._closed = True
            opener = self._opener
        if opener is not None:
            opener.join()
        found, self._found = self._found, {}
        for device in {device for _, device in found}:
            with cuda.current(device), cuda.relaxed_capture():
                for (id, on), address in found.items():
                    if on == device and self._sources[id].handle is not None:
                        cuda.close_handle(address)

    def _open(self) -> None:
        try:
            cuda.relax_capture()
            while (device := self._next_device()) is not None:
                with cuda.current(device):
                    self._open_on(device)
        except Exception as error:
            with self._changed:
                self._error, self._opener = error, None
                self._changed.notify_all()

    def _next_device(self) -> int | None:
        """Where the first that is wanted is wanted; None when the thread is to end."""
        with self._changed:
            if self._closed or not self._wanted:
                self._opener = None
                return None
            return next(iter(self._wanted))[1]

    def _open_on(self, device: int) -> None:
        """Open what is wanted, as long as it is for this GPU."""
        while True:
            with self._changed:
                if self._closed or not self._wanted:
                    return
                id, on = next(iter(self._wanted))
                handle = self._sources[id].handle
            if on != device:
                return
            assert handle is not None
            address = cuda.open_handle(handle)
            with self._changed:
                self._found[id, device] = address
                del self._wanted[id, device]  # wherever it stands by now
                self._changed.notify_all()
