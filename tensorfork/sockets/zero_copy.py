"""Sending memory through a ZeroMQ socket without a copy."""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import zmq


class ZeroCopySender:
    """Sends memory through a socket as it lies there: neither copied nor kept track of. libzmq reads it at any time
    until the socket's context has ended, so whoever lends it keeps it alive until then.

    pyzmq has no word for that: for each frame that it does not copy it wakes a thread that lets go of a Python object,
    which costs more than to send 64 KiB.
    """

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket, self._handle = socket, socket.underlying
        self._message = (ctypes.c_uint64 * 8)()  # a zmq_msg_t: 64 bytes, zmq.h says
        self._at = ctypes.addressof(self._message)

    def send(self, stretches: Sequence[tuple[int, int]]) -> None:
        """The end of a message, its beginning sent already: a frame for each (address, bytes), at least one."""
        last = len(stretches) - 1
        for i, (address, nbytes) in enumerate(stretches):
            flags = _MORE if i < last else _LAST
            if _libzmq is None:
                self._socket.send((ctypes.c_char * nbytes).from_address(address), flags, copy=False)
            else:
                _libzmq.zmq_msg_init_data(self._at, address, nbytes, None, None)  # none to be told: a constant message
                if _libzmq.zmq_msg_send(self._at, self._handle, flags) < 0:
                    raise zmq.ZMQError(ctypes.get_errno())


_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


def _find_libzmq() -> Any:
    """The libzmq that pyzmq uses, found through its own module wherever it came from; None where that hides it."""
    try:
        found = ctypes.CDLL(sys.modules[zmq.backend.Socket.__module__].__file__, use_errno=True)
        found.zmq_msg_init_data.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_void_p] * 2]
        found.zmq_msg_send.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    except (OSError, AttributeError, KeyError):
        return None
    return found


_libzmq = _find_libzmq()
