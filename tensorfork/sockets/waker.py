"""Waking a thread that polls."""

import socket


class Waker:
    """Wakes a polling thread from any other thread. The polling thread registers `fileno()`, and calls `clear` when it
    has been woken.
    """

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        """The file descriptor to poll for reading."""
        return self._receiver.fileno()

    def wake(self) -> None:
        """Wake the polling thread. Has no effect if it is awake already, or if the waker is closed."""
        try:
            self._sender.send(b"!")
        except OSError:  # its buffer is full, so that the thread is being woken; or it is closed
            return

    def clear(self) -> None:
        """Discard every wake-up so far, so that the next poll waits."""
        try:
            while self._receiver.recv(4096):
                pass
        except OSError:
            return

    def close(self) -> None:
        """Close both sockets."""
        self._receiver.close()
        self._sender.close()
