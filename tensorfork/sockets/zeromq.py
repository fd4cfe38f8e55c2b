"""ZeroMQ contexts and sockets with every limit set.

libzmq's defaults assume peers that are trusted: a message of any size, 30 s for a handshake, waiting at close. Anybody
may connect to a seed's port, so none of these is left at its default.
"""

import time
from collections.abc import Iterator

import zmq

from tensorfork.interpreter.limits import require_descriptors, require_threads
from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import ConnectionGuard

HANDSHAKE_MS = 5_000
"""Milliseconds for ZeroMQ's handshake; then the connection is closed."""


def new_context(io_threads: int = 1) -> "zmq.Context[zmq.Socket[bytes]]":
    """A new context. Raises `ResourceExhausted` when this process has few file descriptors or threads left.

    libzmq ends the process when it gets none.
    """
    require_descriptors()
    require_threads(1 + io_threads)
    return zmq.Context(io_threads)


def new_socket(
    context: "zmq.Context[zmq.Socket[bytes]]", kind: int, *, max_message: int, queue: int
) -> "zmq.Socket[bytes]":
    """A socket that receives frames of at most `max_message` bytes, and queues `queue` messages (0: without limit).

    When it is closed, unsent messages are dropped.
    """
    socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = max_message
    socket.handshake_ivl = HANDSHAKE_MS
    socket.sndhwm = socket.rcvhwm = queue
    socket.setsockopt(zmq.IMMEDIATE, 1)
    return socket


def heartbeats(socket: "zmq.Socket[bytes]", stall: float) -> None:
    """Have libzmq end a connection whose peer gives no sign of life for `stall` seconds. Call it before the socket is
    bound or connected.

    A ping that is due waits behind bytes that the peer does not take; so that has a limit of its own, the kernel's
    (`TCP_USER_TIMEOUT`). Of what is answered libzmq sees whole frames alone, and none while the socket's queue is full:
    it must be one without a limit, or be read all the time.
    """
    interval = max(1, int(stall * 1000 / 3))
    socket.setsockopt(zmq.HEARTBEAT_IVL, interval)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(stall * 1000) - interval))
    socket.setsockopt(zmq.TCP_MAXRT, int(stall * 1000))


def bind(socket: "zmq.Socket[bytes]", address: Address) -> Address:
    """Bind to an address, and return it with the port that was chosen.

    Raises `zmq.ZMQError` when the address is taken, or not one of this host.
    """
    socket.ipv6 = ":" in address.host
    socket.bind(str(address))
    return Address.parse(socket.get_string(zmq.LAST_ENDPOINT))


def connect(socket: "zmq.Socket[bytes]", address: Address) -> None:
    """Begin to connect to a resolved address. Success or failure shows later, in the socket's monitor."""
    socket.ipv6 = ":" in address.host
    socket.connect(str(address))


def recv_arrived(socket: "zmq.Socket[bytes]", most: int, guard: ConnectionGuard | None = None) -> Iterator[list[bytes]]:
    """The messages that have arrived, at most so many, each as its frames; waits for none. A guard is told of each.

    A peer that vanished in the middle of a message counts as one, and is passed over. Raises `zmq.ZMQError` once the
    socket or its context is closed.
    """
    for _ in range(most):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        except zmq.ZMQError as error:
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise
            continue
        if guard is not None:
            guard.received(frames)
        yield [frame.bytes for frame in frames]


def poll_timeout(deadline: float) -> int:
    """Milliseconds until the deadline, for a poll: never negative, and rounded up, so that no loop spins before it."""
    seconds = deadline - time.monotonic()
    return 0 if seconds <= 0 else int(seconds * 1000) + 1
