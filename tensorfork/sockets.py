"""ZeroMQ sockets with every limit set, and addresses.

libzmq's defaults are made for friends: no limit on a message, 30 s for a handshake, waiting at close. A seed's port
hears from anybody, so nothing here is left at its default.
"""

import ctypes
import errno
import ipaddress
import os
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq
from attrs import frozen

from tensorfork.errors import PeerUnreachable

HANDSHAKE_MS = 5_000
DESCRIPTORS = 48
"""File descriptors that must be free before a context is made; one with its sockets takes about a dozen."""
WILDCARDS = {"0.0.0.0", "*", "::"}
_ADDRESS = re.compile(r"(?:tcp://)?(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\*|\d{1,5})")


@frozen
class Address:
    """A TCP address. `str()` gives the form that ZeroMQ and people use, with IPv6 in brackets."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From ``tcp://host:port`` or ``host:port``; a port of ``*`` becomes None. Raises `ValueError`."""
        found = _ADDRESS.fullmatch(text)
        port = None if found is None or found["port"] == "*" else int(found["port"])
        if found is None or (port or 0) > 65535 or not (found["host"] or _is_ipv6(found["v6"])):
            raise ValueError(f"{text!r} is not an address; write tcp://host:port, or tcp://[::1]:port for IPv6")
        return cls(found["host"] or found["v6"], port)

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every interface, so that nobody can connect to it."""
        return self.host in WILDCARDS

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{'*' if self.port is None else self.port}"


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def resolve(address: Address, deadline: float) -> Address:
    """The address with its host's name looked up, within the deadline (the system's resolver has none).

    Raises `PeerUnreachable` when there is no such host.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
            found.append(error)

    thread = threading.Thread(target=look_up, name="tensorfork-resolve", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    answer = found[0] if found else TimeoutError("no answer from the resolver")
    if isinstance(answer, Exception):
        raise PeerUnreachable(
            f"{address}: no such host (looking up the name): {answer}. Check the address the seed printed."
        ) from answer
    return Address(answer, address.port)


def context(io_threads: int = 1) -> "zmq.Context[zmq.Socket[bytes]]":
    """A context of its own. Raises `OSError` where it could take the last file descriptors of this process: libzmq
    ends the process when it gets none, and whoever holds idle connections to a seed could have it do so.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and used + DESCRIPTORS > limit:
        raise OSError(
            errno.EMFILE,
            f"{used} of {limit} file descriptors are in use, too many to begin; raise the limit (ulimit -n)",
        )
    return zmq.Context(io_threads)


def make(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, *, max_message: int, queue: int) -> "zmq.Socket[bytes]":
    """A socket that takes messages of at most `max_message` bytes, holds `queue` of them, and closes at once."""
    made = context.socket(kind)
    made.linger = 0
    made.maxmsgsize = max_message
    made.handshake_ivl = HANDSHAKE_MS
    made.sndhwm = made.rcvhwm = queue
    made.setsockopt(zmq.IMMEDIATE, 1)
    return made


def bind(made: "zmq.Socket[bytes]", address: Address) -> Address:
    """Bind, and say where. Raises `OSError` (`zmq.ZMQError` is one) when the address is taken or not ours."""
    made.ipv6 = ":" in address.host
    made.bind(str(address))
    return Address.parse(made.get_string(zmq.LAST_ENDPOINT))


def connect(made: "zmq.Socket[bytes]", address: Address) -> None:
    """Begin to connect to a resolved address; says nothing of success."""
    made.ipv6 = ":" in address.host
    made.connect(str(address))


def milliseconds(deadline: float) -> int:
    """What is left until the deadline, for a poll: never negative, and never a busy loop before it."""
    left = deadline - time.monotonic()
    return 0 if left <= 0 else int(left * 1000) + 1


class Lender:
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


class Bell:
    """Wakes a thread that polls, from any other: register `fileno()`, and `silence()` it once awake."""

    def __init__(self) -> None:
        self._ear, self._clapper = socket.socketpair()
        self._ear.setblocking(False)
        self._clapper.setblocking(False)

    def fileno(self) -> int:
        """What to poll."""
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake it. Harmless when it is awake, or gone."""
        try:
            self._clapper.send(b"!")
        except OSError:  # it rings already, or nobody is left to hear it
            return

    def silence(self) -> None:
        """Take note of all rings so far."""
        try:
            while self._ear.recv(4096):
                pass
        except OSError:
            return

    def close(self) -> None:
        """Give both ends back."""
        self._ear.close()
        self._clapper.close()
