"""Sending memory through a ZeroMQ socket without a copy."""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import zmq


class ZeroCopySender:
    """Sends memory through a socket without copying it.

    libzmq may read the memory until the socket's context has ended; the caller keeps it alive until then.

    pyzmq cannot do that: for each frame that it does not copy it wakes a thread, which releases a Python object. That
    costs more than sending 64 KiB.
    """

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket, self._handle = socket, socket.underlying
        self._message = (ctypes.c_uint64 * 8)()  # a zmq_msg_t, which has 64 bytes in zmq.h
        self._message_address = ctypes.addressof(self._message)

    def send(self, spans: Sequence[tuple[int, int]]) -> None:
        """Send the last frames of a message, one for each (address, nbytes), at least one. Raises `zmq.ZMQError`.

        The frames before them were sent with SNDMORE.
        """
        last = len(spans) - 1
        for i, (address, nbytes) in enumerate(spans):
            flags = _MORE if i < last else _LAST
            if _libzmq is None:
                self._socket.send((ctypes.c_char * nbytes).from_address(address), flags, copy=False)
            else:  # without a function to release the memory, libzmq takes it for constant
                _libzmq.zmq_msg_init_data(self._message_address, address, nbytes, None, None)
                if _libzmq.zmq_msg_send(self._message_address, self._handle, flags) < 0:
                    raise zmq.ZMQError(ctypes.get_errno())


_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def _find_libzmq() -> Any:
    """The libzmq that pyzmq uses, found through pyzmq's own module; None where it cannot be found that way."""
    try:
        found = ctypes.CDLL(sys.modules[zmq.backend.Socket.__module__].__file__, use_errno=True)
        found.zmq_msg_init_data.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * 2]
        found.zmq_msg_send.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    except (OSError, AttributeError, KeyError):
        return None
    return found


_libzmq = _find_libzmq()
