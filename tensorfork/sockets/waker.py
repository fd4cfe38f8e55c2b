"""Waking a thread that polls."""

import socket


class Waker:
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
