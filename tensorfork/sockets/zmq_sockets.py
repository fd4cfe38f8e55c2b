"""ZeroMQ sockets with every limit set, and addresses.

libzmq's defaults are made for friends: no limit on a message, 30 s for a handshake, waiting at close. A seed's port
hears from anybody, so nothing here is left at its default.
"""

import errno
import os
import resource
import time

import zmq

from tensorfork.sockets.address import Address

HANDSHAKE_MS = 5_000

DESCRIPTORS = 48
"""File descriptors that must be free before a context is made; one with its sockets takes about a dozen."""


def new_context(io_threads: int = 1) -> "zmq.Context[zmq.Socket[bytes]]":
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


def new_socket(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: int, *, max_message: int, queue: int
) -> "zmq.Socket[bytes]":
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


def poll_timeout(deadline: float) -> int:
    """What is left until the deadline, for a poll: never negative, and never a busy loop before it."""
    left = deadline - time.monotonic()
    return 0 if left <= 0 else int(left * 1000) + 1
