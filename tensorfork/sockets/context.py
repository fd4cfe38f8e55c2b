"""The process's ZeroMQ context, whose threads serve all of its connections, and the sockets that are made in it.

There is one for as long as somebody uses it. So 64 leases of a seed, or the connections of a fork, cost no more threads
than one.
"""

import itertools
import os
import threading

import zmq

from tensorfork.interpreter.limits import require_descriptors, require_threads

IO_THREADS = max(2, min(4, len(os.sched_getaffinity(0)) // 2))
"""Threads that move the bytes: libzmq gives each new connection to the one that has the fewest."""
MAX_SOCKETS = 4096
"""libzmq's own default is 1023."""
HANDSHAKE_MS = 5_000
"""Milliseconds for ZeroMQ's handshake; then the connection is closed."""


class _Shared:
    """The context of this process, and how many use it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.context: zmq.Context[zmq.Socket[bytes]] | None = None
        self.users = 0
        self.numbers = itertools.count()


_shared = _Shared()


class Sockets:
    """The sockets of one user of the context, with every limit set.

    libzmq's defaults assume peers that are trusted: a message of any size, 30 s for a handshake, waiting at close.
    Anybody may connect to a seed's port, so none of these is left at its default.
    """

    def __init__(self) -> None:
        """Begin to use the context. Raises `ResourceExhausted` when this process has few file descriptors or threads
        left: libzmq ends the process when it gets none.
        """
        require_descriptors()
        self._pid = os.getpid()
        self._made: list[zmq.Socket[bytes]] = []
        with _shared.lock:
            if _shared.context is None:
                require_threads(1 + IO_THREADS)
                _shared.context = zmq.Context(IO_THREADS)
                _shared.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            _shared.users += 1
            self._context: zmq.Context[zmq.Socket[bytes]] | None = _shared.context

    def new(self, kind: int, *, max_message: int, queue: int) -> "zmq.Socket[bytes]":
        """A socket that receives frames of at most `max_message` bytes, and queues `queue` messages (0: without limit).

        When it is closed, unsent messages are dropped.
        """
        assert self._context is not None
        socket = self._context.socket(kind)
        self._made.append(socket)
        socket.linger = 0
        socket.maxmsgsize = max_message
        socket.handshake_ivl = HANDSHAKE_MS
        socket.sndhwm = socket.rcvhwm = queue
        socket.setsockopt(zmq.IMMEDIATE, 1)
        return socket

    def monitor(self, socket: "zmq.Socket[bytes]", events: int) -> "zmq.Socket[bytes]":
        """A socket with these events of another one's connections. Call it before that binds or connects."""
        monitor = socket.get_monitor_socket(events, f"inproc://tensorfork-{next(_shared.numbers)}")
        monitor.linger = 0
        self._made.append(monitor)
        return monitor

    def close(self, linger_ms: int = 0) -> None:
        """Close them all; what was sent and is still on its way has so many milliseconds. A second call does nothing.

        Where nobody else uses the context it ends here, with its threads. Memory that was lent to a socket may be read
        until what `zero_copy.Releases` says.
        """
        context, self._context = self._context, None
        if context is None or self._pid != os.getpid():
            return
        for socket in self._made:
            socket.disable_monitor()
        for socket in self._made:
            socket.close(linger_ms)
        with _shared.lock:
            _shared.users -= 1
            if not _shared.users:
                context.term()
                _shared.context = None


def _forget() -> None:
    """For the child of `os.fork()`: the threads of the context are the parent's."""
    global _shared
    _abandoned.append(_shared.context)
    _shared = _Shared()


_abandoned: list[object] = []
"""Contexts of the parent, which a child must not end."""

os.register_at_fork(after_in_child=_forget)
