"""Sending memory through a ZeroMQ socket without a copy, and learning when libzmq has released it."""

import ctypes
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

NUMBERS = range(62)
"""What a notice of release can be numbered with."""
LOOK_AGAIN = 0.01
"""Seconds between two looks whether a connection is closed of which no notice will come."""


class Releases:
    """Notices of memory that libzmq has released: an eventfd, in which each number has its bit.

    Memory that was lent to a connection is free once its notice has come. Where the connection ended before the notice
    could be sent behind the memory, it is free once the connection's descriptor is closed: what reads the memory,
    libzmq's engine, is gone then. What libzmq may hold of it after that it drops without reading it.
    """

    def __init__(self) -> None:
        self._file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._without_notice: list[tuple[int, Callable[[], bool]]] = []

    def fileno(self) -> int:
        """The descriptor, to poll for reading."""
        return self._file

    def tell(self, number: int) -> None:
        """Say that the memory of a number is free. For any thread."""
        os.eventfd_write(self._file, 1 << number)

    def no_notice(self, number: int, is_closed: Callable[[], bool]) -> None:
        """Say that no notice of a number will come, and what tells when its connection is closed. For the thread that
        waits.
        """
        self._without_notice.append((number, is_closed))

    def take(self) -> Sequence[int]:
        """The numbers of what has been released since the last call. For one thread."""
        for one in [one for one in self._without_notice if one[1]()]:
            self._without_notice.remove(one)
            self.tell(one[0])
        try:
            bits = os.eventfd_read(self._file)
        except BlockingIOError:
            return ()
        return [number for number in NUMBERS if bits >> number & 1]

    def wait(self, stop: int | None, deadline: float) -> Sequence[int]:
        """The numbers that have been released since the last call. If there are none, waits until there is one, until
        the deadline, or until the descriptor `stop` can be read.
        """
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        if stop is not None:
            poll.register(stop, select.POLLIN)
        while not (released := self.take()):
            left = deadline - time.monotonic()
            if left <= 0 or any(file == stop for file, _ in poll.poll(self._milliseconds(left))):
                break
        return released

    def _milliseconds(self, left: float) -> int:
        return int(min(left, LOOK_AGAIN if self._without_notice else 60.0) * 1000) + 1

    def close(self) -> None:
        """Close the descriptor. Every number that was lent must have come back: libzmq would write to whatever has the
        descriptor's number by then.
        """
        os.close(self._file)


class ZeroCopySender:
    """Sends memory through a socket without copying it, and has libzmq tell when it has released it.

    libzmq releases what it sends to one peer in order. So an empty message behind the memory, whose release is told, is
    the notice that the memory is free: also where the peer goes, since the engine that sends is ended before what waits
    behind it is dropped. libzmq then calls eventfd_write(3), which adds a bit to an eventfd: no Python runs for it, and
    neither the interpreter nor a thread is waited for. Where libzmq or that function cannot be called directly, pyzmq's
    own way is taken. It wakes a thread for each frame, which costs more than sending 64 KiB.

    What waits for a peer that has gone is dropped only once everything that came from it has been received: whoever
    lends memory must go on receiving.

    The notice is a message of its own. As the last frame of the message before it was tried: while such a message is
    half sent, libzmq 4.3.5 ends the process if its peer goes at the moment when the socket is closed.
    """

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket, self._handle = socket, socket.underlying
        self._message = (ctypes.c_uint64 * 8)()  # a zmq_msg_t, which has 64 bytes in zmq.h
        self._message_address = ctypes.addressof(self._message)

    def send_part(self, data: bytes, *, more: bool) -> None:
        """Send a frame of a few bytes. Raises `zmq.ZMQError`."""
        flags = _NOBLOCK | (_MORE if more else 0)
        if _native is None:
            self._socket.send(data, flags)
        elif _native.libzmq.zmq_send(self._handle, data, len(data), flags) < 0:
            raise zmq.ZMQError(ctypes.get_errno())

    def send(self, address: int, nbytes: int) -> None:
        """Send memory as the last frame of a message. Raises `zmq.ZMQError`.

        libzmq may read it until a notice that was sent after it to the same peer has come.
        """
        if _native is None:
            memory = (ctypes.c_char * nbytes).from_address(address)
            self._socket.send(zmq.Frame(memory, copy=False, copy_threshold=0), zmq.NOBLOCK, copy=False)
        else:  # without a function to release the memory, libzmq takes it for constant
            self._send(address, nbytes, None, None)

    def send_notice(self, releases: Releases, number: int) -> None:
        """Send an empty frame, the last of its message, whose release is told. A number (one of `NUMBERS`) must not be
        used again before it has come back. Raises `zmq.ZMQError`; the number then never comes.
        """
        if _native is None:
            notice = _Notice(releases, number)
            try:
                self._socket.send(zmq.Frame(notice, copy=False, copy_threshold=0), zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                notice.releases = None
                raise
        else:  # libzmq calls eventfd_write(data, hint); of a frame of no bytes it reads nothing
            self._send(releases.fileno(), 0, _native.eventfd_write, 1 << number)

    def _send(self, address: int, nbytes: int, function: Any, hint: int | None) -> None:
        assert _native is not None
        _native.libzmq.zmq_msg_init_data(self._message_address, address, nbytes, function, hint)
        if _native.libzmq.zmq_msg_send(self._message_address, self._handle, _NOBLOCK) < 0:
            raise zmq.ZMQError(ctypes.get_errno())


_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)


class _Notice(bytearray):
    """An empty frame's memory: pyzmq drops it once libzmq has released it."""

    def __init__(self, releases: Releases, number: int) -> None:
        super().__init__()
        self.releases: Releases | None = releases
        self._number = number

    def __del__(self) -> None:
        if self.releases is not None:
            self.releases.tell(self._number)


class _Native:
    """The libzmq that pyzmq uses, found through pyzmq's own module, and the C library's eventfd_write.

    What is called here takes microseconds and never waits, so the interpreter is kept: to give it away five times an
    answer, while another thread wants it, costs more than all of them.
    """

    def __init__(self) -> None:
        self.libzmq: Any = ctypes.PyDLL(sys.modules[zmq.backend.Socket.__module__].__file__, use_errno=True)
        pointer = ctypes.c_void_p
        self.libzmq.zmq_msg_init_data.argtypes = [pointer, pointer, ctypes.c_size_t, pointer, pointer]
        self.libzmq.zmq_send.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        self.libzmq.zmq_msg_send.argtypes = [pointer, pointer, ctypes.c_int]
        self.eventfd_write = ctypes.cast(ctypes.CDLL(None).eventfd_write, pointer)


def _find_native() -> _Native | None:
    """None where they cannot be found that way, or where a pointer does not have the 64 bits of an eventfd's value."""
    try:
        return _Native() if ctypes.sizeof(ctypes.c_void_p) == 8 else None
    except (OSError, AttributeError, KeyError):
        return None


_native = _find_native()
