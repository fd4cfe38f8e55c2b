"""A seed in a process of its own, and raw connections to it that send whatever a test likes."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import zmq
from processes import Child

import tensorfork
from tensorfork.sockets.port import NOBODY
from tensorfork.wire import messages

SECONDS = 20.0
"""Timeout of what should succeed."""


MUCH = 64 << 20
"""Bytes of memory that no peer may cost a seed."""


def model() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.arange(100.0) + i for i in range(600)}


class Seed:
    """A seed in a process of its own."""

    def __init__(self, child: Child) -> None:
        self.child, self.address = child, child.recv()
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        self.at = (host, int(port))

    def serves(self) -> None:
        """Check that it still serves a fork, and has logged no error."""
        found = tensorfork.fork(self.address, timeout=SECONDS)
        assert all(torch.equal(found[name], tensor) for name, tensor in model().items())
        assert self.child.request("errors") == []

    def memory(self) -> int:
        return psutil.Process(self.child.pid).memory_info().rss


# ZMTP by hand (https://rfc.zeromq.org/spec/23/).

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_PROPERTIES = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\x08Identity" + struct.pack(">I", 0)
READY = bytes([4, len(_PROPERTIES)]) + _PROPERTIES
MORE, LONG = 1, 2


def frame(body: bytes, flags: int = 0) -> bytes:
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


@contextmanager
def raw(seed: Seed, *data: bytes) -> Iterator[socket.socket]:
    """A plain TCP connection on which these bytes were sent."""
    with socket.create_connection(seed.at, timeout=SECONDS) as connection:
        send(connection, b"".join(data))
        yield connection


@contextmanager
def zmtp(seed: Seed) -> Iterator[socket.socket]:
    """A plain TCP connection after ZeroMQ's handshake."""
    with raw(seed, GREETING, READY) as connection:
        got = b""
        while len(got) < len(GREETING) + 10:
            received = connection.recv(4096)
            assert received, "the seed breaks the handshake off"
            got += received
        yield connection


def send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except (ConnectionError, TimeoutError):
        pass  # the seed has closed the connection


def hung_up(connection: socket.socket) -> bool:
    """Whether the seed closes the connection."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@contextmanager
def dealer(seed: Seed) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger = 2000
        made.connect(seed.address)
        yield made


def answers(made: Any) -> list[Any]:
    """The seed's replies to everything that was sent before; a `Hello`, which it always answers, marks the end."""
    number = 0xABCDEF
    made.send(messages.encode(messages.Hello("test"), number))
    found = []
    while True:
        assert made.poll(SECONDS * 1000), "the seed does not answer any more"
        frames = made.recv_multipart()
        if frames == [NOBODY]:  # to what looked like a message to a token
            continue
        got, message = messages.decode(frames[0], messages.REPLIES)
        if got == number and isinstance(message, messages.Welcome):
            return found
        found.append(message)
