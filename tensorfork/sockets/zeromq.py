"""Binding, connecting and receiving, with the sockets that `tensorfork.sockets.context` makes."""

import time
from collections.abc import Iterator

import zmq

from tensorfork.sockets.address import Address
from tensorfork.sockets.connection_guard import ConnectionGuard


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


def recv_arrived(
    socket: "zmq.Socket[bytes]", most: int, guard: ConnectionGuard | None = None, parts: int = 8
) -> "Iterator[list[zmq.Frame]]":
    """The messages that have arrived, at most so many, each as its frames; waits for none. A guard is told of each.

    A peer that vanished in the middle of a message counts as one, and is passed over; so is a message of more than so
    many parts, whose connection the guard ends. Raises `zmq.ZMQError` once the socket or its context is closed.
    """
    for _ in range(most):
        try:
            frames, is_whole = _recv_message(socket, parts)
        except zmq.Again:
            if guard is not None:
                guard.all_received()
            return
        except zmq.ZMQError as error:
            if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise
            continue
        if guard is not None:
            guard.received(frames, is_whole=is_whole)
        if is_whole:
            yield frames


def _recv_message(socket: "zmq.Socket[bytes]", parts: int) -> tuple[list[zmq.Frame], bool]:
    """The next message, and whether that is all of it: parts beyond so many are dropped, each as it comes, since one
    of no bytes is an object of 200 here.
    """
    frames: list[zmq.Frame] = [socket.recv(zmq.NOBLOCK, copy=False)]
    last, is_whole = frames[0], True
    while last.more:
        last = socket.recv(zmq.NOBLOCK, copy=False)
        if len(frames) < parts:
            frames.append(last)
        else:
            is_whole = False
    return frames, is_whole


def poll_timeout(deadline: float) -> int:
    """Milliseconds until the deadline, for a poll: never negative, and rounded up, so that no loop spins before it."""
    seconds = deadline - time.monotonic()
    return 0 if seconds <= 0 else int(seconds * 1000) + 1
