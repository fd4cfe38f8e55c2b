"""Sending memory through a ZeroMQ socket without a copy, and learning when libzmq has released it."""

import ctypes
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import zmq

NUMBERS = range(63)
"""What a notice of release can be numbered with."""


class Releases:
    """Notices of memory that libzmq has released: an eventfd, in which each number has its bit."""

    def __init__(self) -> None:
        self._file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor, to poll for reading."""
        return self._file

    def take(self) -> Sequence[int]:
        """The numbers of what has been released since the last call."""
        try:
            bits = os.eventfd_read(self._file)
        except BlockingIOError:
            return ()
        return [number for number in range(bits.bit_length()) if bits >> number & 1]

    def close(self) -> None:
        """Close the descriptor. The contexts of all sockets that send to it must have ended."""
        os.close(self._file)


class ZeroCopySender:
    """Sends memory through a socket without copying it, each time the last frames of a message, and an empty frame
    behind them.

    libzmq releases the frames of a message in order. The release of the empty frame is therefore the notice that the
    memory before it is free: libzmq then calls eventfd_write(3), which adds a bit to the eventfd of `releases`. So no
    Python runs for it, and neither the interpreter nor a thread is waited for. Where libzmq or that function cannot be
    called directly, pyzmq's own way is taken. It wakes a thread for each frame, which costs more than sending 64 KiB.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", releases: Releases) -> None:
        self._socket, self._handle, self._releases = socket, socket.underlying, releases
        self._poll = select.poll()
        self._poll.register(releases.fileno(), select.POLLIN)
        self._message = (ctypes.c_uint64 * 8)()  # a zmq_msg_t, which has 64 bytes in zmq.h
        self._message_address = ctypes.addressof(self._message)

    def send(self, spans: Sequence[tuple[int, int]], number: int | None = None) -> None:
        """Send a frame for each (address, nbytes), then the empty one. The frames before were sent with SNDMORE.

        Without a number, libzmq may read the memory until the socket's context has ended; with one (see `NUMBERS`),
        until `wait` returns that number. A number is used for one message at a time. Raises `zmq.ZMQError`; the
        memory may then be read until the context has ended.
        """
        if _native is None:
            for address, nbytes in spans:
                memory = (ctypes.c_char * nbytes).from_address(address)
                self._socket.send(zmq.Frame(memory, copy=False, copy_threshold=0), _MORE, copy=False)
            notice = bytearray() if number is None else _Notice(self._releases.fileno(), number)
            self._socket.send(zmq.Frame(notice, copy=False, copy_threshold=0), _LAST, copy=False)
            return
        for address, nbytes in spans:  # without a function to release the memory, libzmq takes it for constant
            self._send(address, nbytes, None, None, _MORE)
        if number is None:
            self._send(None, 0, None, None, _LAST)
        else:  # libzmq calls eventfd_write(data, hint); of a frame of no bytes it reads nothing
            self._send(self._releases.fileno(), 0, _native.eventfd_write, 1 << number, _LAST)

    def wait(self, stop: int) -> Sequence[int]:
        """The numbers of what libzmq has released since the last call. If nothing was, waits until something is, or the
        descriptor `stop` can be read.

        Where a peer goes that has not read everything, libzmq may keep the memory until the socket's context ends.
        """
        self._poll.register(stop, select.POLLIN)
        while not (released := self._releases.take()):
            if any(file == stop for file, _ in self._poll.poll()):
                break
        return released

    def _send(self, address: int | None, nbytes: int, function: Any, hint: int | None, flags: int) -> None:
        assert _native is not None
        _native.libzmq.zmq_msg_init_data(self._message_address, address, nbytes, function, hint)
        if _native.libzmq.zmq_msg_send(self._message_address, self._handle, flags) < 0:
            raise zmq.ZMQError(ctypes.get_errno())


_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


class _Notice(bytearray):
    """An empty frame's memory: pyzmq drops it once libzmq has released it."""

    def __init__(self, file: int, number: int) -> None:
        super().__init__()
        self._file, self._number = file, number

    def __del__(self) -> None:
        os.eventfd_write(self._file, 1 << self._number)


class _Native:
    """The libzmq that pyzmq uses, found through pyzmq's own module, and the C library's eventfd_write."""

    def __init__(self) -> None:
        self.libzmq: Any = ctypes.CDLL(sys.modules[zmq.backend.Socket.__module__].__file__, use_errno=True)
        pointer = ctypes.c_void_p
        self.libzmq.zmq_msg_init_data.argtypes = [pointer, pointer, ctypes.c_size_t, pointer, pointer]
        self.libzmq.zmq_msg_send.argtypes = [pointer, pointer, ctypes.c_int]
        self.eventfd_write = ctypes.cast(ctypes.CDLL(None).eventfd_write, pointer)


def _find_native() -> _Native | None:
    """None where they cannot be found that way, or where a pointer does not have the 64 bits of an eventfd's value."""
    try:
        return _Native() if ctypes.sizeof(ctypes.c_void_p) == 8 else None
    except (OSError, AttributeError, KeyError):
        return None


_native = _find_native()
