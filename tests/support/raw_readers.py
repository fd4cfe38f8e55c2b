"""Peers of a lease over ZeroMQ, by hand: they take what they are sent when they like, and hang up as they like."""

import ctypes
import mmap
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hostile import GREETING, READY, SECONDS, frame

from tensorfork.transports.zeromq.buffers import AnswerBuffers

LITTLE = 4096
"""A receive buffer that takes next to nothing."""


def connect(at: tuple[str, int], receive_buffer: int = LITTLE) -> socket.socket:
    """A connection after ZeroMQ's handshake, whose kernel takes about so many bytes while it does not read."""
    made = socket.socket()
    made.settimeout(SECONDS)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect(at)
    made.sendall(GREETING)
    read(made, len(GREETING))
    made.sendall(READY)
    _, length = read(made, 2)
    read(made, length)
    return made


def read(connection: socket.socket, nbytes: int) -> bytes:
    """So many bytes, or as many as come before the end."""
    received = b""
    while len(received) < nbytes and (some := connection.recv(nbytes - len(received))):
        received += some
    return received


def ask(connection: socket.socket, request: bytes, times: int) -> None:
    """Send a request so many times."""
    connection.sendall(frame(request) * times)


def hang_up(connection: socket.socket, abruptly: bool) -> None:
    """Close it; abruptly: with a reset, as where the process has died with bytes unread."""
    if abruptly:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def nobody_reads_free_slots() -> Iterator[list[int]]:
    """Inside, a slot of a lease can be neither read nor written but while the lease has taken it: libzmq ends the
    process where it reads one (EFAULT), and so does whatever else does. How often each was given back is counted.
    """
    given_back = [0]
    init, take, give_back, close = (
        AnswerBuffers.__init__,
        AnswerBuffers.take,
        AnswerBuffers.give_back,
        AnswerBuffers.close,
    )

    def protected_init(self: AnswerBuffers, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        for slot in self._share.slots:
            _protect(slot, self._share.slot_bytes, 0)

    def protected_take(self: AnswerBuffers) -> tuple[int, int] | None:
        taken = take(self)
        if taken is not None:
            _protect(taken[1], self._share.slot_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        return taken

    def protected_give_back(self: AnswerBuffers, number: int) -> None:
        _protect(self._share.slots[number], self._share.slot_bytes, 0)
        given_back[0] += 1
        give_back(self, number)

    def protected_close(self: AnswerBuffers) -> None:
        for slot in self._share.slots:
            _protect(slot, self._share.slot_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerBuffers, "__init__", protected_init)
        patch.setattr(AnswerBuffers, "take", protected_take)
        patch.setattr(AnswerBuffers, "give_back", protected_give_back)
        patch.setattr(AnswerBuffers, "close", protected_close)
        yield given_back


def _protect(address: int, nbytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")
