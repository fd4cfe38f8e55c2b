"""The process's ZeroMQ contexts, whose threads serve all of its connections, and the sockets that are made in them.

There is one for what moves many bytes, the ports of seeds and the data of forks, and one with a single thread for
forks' conversations; each for as long as somebody uses it. So 64 leases of a seed, or the connections of a fork, cost
no more threads than one.

Why two: a fork over another transport needs no more than its conversation. On virtual machines with two GPUs the step
`hello` took 20 to 45 ms with four threads and 3 with one, before other changes; docs/performance.md has the pause.
"""

import itertools
import os
import threading

import zmq

from tensorfork.interpreter.limits import require_descriptors, require_threads

IO_THREADS = max(2, min(4, len(os.sched_getaffinity(0)) // 2))
"""Threads that move many bytes: libzmq gives each new connection to the one that has the fewest."""
MAX_SOCKETS = 4096
"""libzmq's own default is 1023."""
HANDSHAKE_MS = 5_000
"""Milliseconds for ZeroMQ's handshake; then the connection is closed."""


class _Shared:
    """One of the contexts of this process, and how many use it."""

    def __init__(self, io_threads: int) -> None:
        self.lock, self.io_threads = threading.Lock(), io_threads
        self.context: zmq.Context[zmq.Socket[bytes]] | None = None
        self.users = 0


def _new_contexts() -> dict[bool, _Shared]:
    return {False: _Shared(1), True: _Shared(IO_THREADS)}


_shared = _new_contexts()
_numbers = itertools.count()


class Sockets:
    """The sockets of one user of a context, with every limit set.

    libzmq's defaults assume peers that are trusted: a message of any size, 30 s for a handshake, waiting at close.
    Anybody may connect to a seed's port, so none of these is left at its default.
    """

    def __init__(self, *, many_bytes: bool) -> None:
        """Begin to use a context: the one for many bytes, or the other. Raises `ResourceExhausted` when this process
        has few file descriptors or threads left: libzmq ends the process when it gets none.
        """
        require_descriptors()
        self._pid, self._shared = os.getpid(), _shared[many_bytes]
        self._made: list[zmq.Socket[bytes]] = []
        with self._shared.lock:
            if self._shared.context is None:
                require_threads(1 + self._shared.io_threads)
                self._shared.context = zmq.Context(self._shared.io_threads)
                self._shared.context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            self._shared.users += 1
            self._context: zmq.Context[zmq.Socket[bytes]] | None = self._shared.context

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
        monitor = socket.get_monitor_socket(events, f"inproc://tensorfork-{next(_numbers)}")
        monitor.linger = 0
        self._made.append(monitor)
        return monitor

    def close(self, linger_ms: int = 0) -> None:
        """Close them all; what was sent and is still on its way has so many milliseconds. A second call does nothing.

        Where nobody else uses their context it ends here, with its threads. Memory that was lent to a socket may be
        read until what `zero_copy.Releases` says.
        """
        context, self._context = self._context, None
        if context is None or self._pid != os.getpid():
            return
        for socket in self._made:
            socket.disable_monitor()
        for socket in self._made:
            socket.close(linger_ms)
        with self._shared.lock:
            self._shared.users -= 1
            if not self._shared.users:
                context.term()
                self._shared.context = None


def _forget() -> None:
    """For the child of `os.fork()`: the threads of the contexts are the parent's."""
    global _shared
    _abandoned.extend(one.context for one in _shared.values())
    _shared = _new_contexts()


_abandoned: list[object] = []
"""Contexts of the parent, which a child must not end."""

os.register_at_fork(after_in_child=_forget)
