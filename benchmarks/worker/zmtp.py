"""Connections that speak ZeroMQ's protocol by hand (https://rfc.zeromq.org/spec/23/) and send what no library does."""

import socket
import struct

MORE, LONG = 1, 2
_PROPERTIES = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\x08Identity" + struct.pack(">I", 0)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = bytes([4, len(_PROPERTIES)]) + _PROPERTIES
ANNOUNCED = bytes([LONG]) + struct.pack(">Q", 1 << 40)
"""The beginning of a frame of 2^40 bytes."""


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame, with its length in 8 bytes."""
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


def connect(at: tuple[str, int], timeout: float, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which the handshake is done."""
    made = socket.socket()
    try:
        made.settimeout(timeout)
        if receive_buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        made.connect(at)
        made.sendall(GREETING)
        receive(made, len(GREETING))
        made.sendall(READY)
        flags, length = receive(made, 2)  # its READY is a short command
        receive(made, length)
        assert flags == 4
    except BaseException:
        made.close()
        raise
    return made


def receive(connection: socket.socket, nbytes: int) -> bytes:
    """Exactly so many bytes. Raises `ConnectionError` where the peer hangs up before."""
    received = b""
    while len(received) < nbytes:
        some = connection.recv(nbytes - len(received))
        if not some:
            raise ConnectionError("the peer has hung up")
        received += some
    return received
