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
    """Sends memory through a socket without copying it, and learns when libzmq has released it.

    libzmq releases what it sends to one peer in order. So an empty message behind the memory, whose release is told, is
    the notice that the memory is free. libzmq then calls eventfd_write(3), which adds a bit to the eventfd of
    `releases`: no Python runs for it, and neither the interpreter nor a thread is waited for. Where libzmq or that
    function cannot be called directly, pyzmq's own way is taken. It wakes a thread for each frame, which costs more
    than sending 64 KiB.

    The notice is a message of its own. As the last frame of the message before it was tried: while such a message is
    half sent, libzmq 4.3.5 ends the process if its peer goes at the moment when the socket is closed.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", releases: Releases) -> None:
        self._socket, self._handle, self._releases = socket, socket.underlying, releases
        self._poll = select.poll()
        self._poll.register(releases.fileno(), select.POLLIN)
        self._message = (ctypes.c_uint64 * 8)()  # a zmq_msg_t, which has 64 bytes in zmq.h
        self._message_address = ctypes.addressof(self._message)

    def send(self, address: int, nbytes: int) -> None:
        """Send memory as the last frame of a message. Raises `zmq.ZMQError`.

        libzmq may read it until `wait` returns the number of a notice that was sent after it to the same peer, or the
        socket's context has ended.
        """
        if _native is None:
            memory = (ctypes.c_char * nbytes).from_address(address)
            self._socket.send(zmq.Frame(memory, copy=False, copy_threshold=0), zmq.NOBLOCK, copy=False)
        else:  # without a function to release the memory, libzmq takes it for constant
            self._send(address, nbytes, None, None)

    def send_notice(self, number: int) -> None:
        """Send an empty frame, the last of its message, whose release is told. A number (one of `NUMBERS`) must not be
        used again before `wait` has returned it. Raises `zmq.ZMQError`; the number may then never come.
        """
        if _native is None:
            notice = zmq.Frame(_Notice(self._releases.fileno(), number), copy=False, copy_threshold=0)
            self._socket.send(notice, zmq.NOBLOCK, copy=False)
        else:  # libzmq calls eventfd_write(data, hint); of a frame of no bytes it reads nothing
            self._send(self._releases.fileno(), 0, _native.eventfd_write, 1 << number)

    def wait(self, stop: int) -> Sequence[int]:
        """The numbers that libzmq has released since the last call. If there are none, waits until there is one, or the
        descriptor `stop` can be read.

        Where a peer goes that has not read everything, libzmq may keep the memory until the socket's context ends.
        """
        self._poll.register(stop, select.POLLIN)
        while not (released := self._releases.take()):
            if any(file == stop for file, _ in self._poll.poll()):
                break
        return released

    def _send(self, address: int, nbytes: int, function: Any, hint: int | None) -> None:
        assert _native is not None
        _native.libzmq.zmq_msg_init_data(self._message_address, address, nbytes, function, hint)
        if _native.libzmq.zmq_msg_send(self._message_address, self._handle, _NOBLOCK) < 0:
            raise zmq.ZMQError(ctypes.get_errno())


_NOBLOCK = int(zmq.NOBLOCK)


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
