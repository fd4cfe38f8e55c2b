"""Raw peers and seeds that send a message of endless parts, as fast as the other side takes them."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hostile import GREETING, MORE, READY, frame

PART = frame(bytes(255), MORE) * 256
NOTHING = bytes([MORE, 0]) * 30_000
"""Parts of no bytes, each of which takes 64 in libzmq."""


class Flood:
    """One such peer, on a thread. `sent` is how many bytes it got rid of; `ended` is set when it was cut off."""

    def __init__(self, at: tuple[str, int], first: bytes = b"", part: bytes = PART) -> None:
        self.sent, self.ended = 0, threading.Event()
        self._first, self._part = first, part
        self._socket = socket.create_connection(at, 10)
        self._socket.settimeout(10)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._socket.sendall(GREETING)
            self._receive(64)
            self._socket.sendall(READY + self._first)
            while True:
                self.sent += self._socket.send(self._part)
        except OSError:
            self.ended.set()

    def _receive(self, nbytes: int) -> None:
        while nbytes:
            received = self._socket.recv(nbytes)
            if not received:
                raise ConnectionError
            nbytes -= len(received)

    def close(self) -> None:
        self._socket.close()
        self._thread.join(10)


@contextmanager
def floods(at: tuple[str, int], count: int, **options: bytes) -> Iterator[list[Flood]]:
    """So many of them."""
    peers = [Flood(at, **options) for _ in range(count)]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def all_ended(peers: list[Flood], seconds: float) -> bool:
    """Whether all of them were cut off within so many seconds."""
    deadline = time.monotonic() + seconds
    return all(peer.ended.wait(max(0.0, deadline - time.monotonic())) for peer in peers)


def flooding_seed(pipe: Any, part: bytes, until: bytes = b"tensorfork", first: bytes = b"") -> None:
    """A process that listens as a seed does, and answers the first message of each connection with endless parts.

    That is a message with `until` in it; before them goes `first`.

    It sends its address, then for each connection how many bytes it got rid of.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        while True:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(10)
                connection.sendall(GREETING + READY)
                sent, received = 0, b""
                try:
                    while until not in received:
                        received += connection.recv(4096) or pipe.recv()
                    connection.sendall(first)
                    while True:
                        sent += connection.send(part)
                except (OSError, EOFError):
                    pipe.send(sent)
