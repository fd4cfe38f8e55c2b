"""Bounds what peers make libzmq keep of unfinished messages, and ends the connections of those who exceed that.

libzmq hands over a message once all of its parts have come, limits the size of each part and not their number, and
closes no single connection. A peer that sends parts without end fills the process's memory, while the application sees
nothing. Its monitor tells the file descriptor of each connection, though, and each message has that of the connection
it came over (`ZMQ_SRCFD`). So:

- the kernel says how many bytes have arrived on a connection (`TCP_INFO`, `tcp_info.tcpi_bytes_received`, Linux 4.1);
- what whole messages account for is known when they are received; the rest is unfinished, or was not received yet;
- an edge-triggered epoll tells which connections had arrivals since the last look: idle ones cost nothing;
- a connection is ended by `shutdown(2)`, and libzmq then closes it as if the peer had.

A descriptor's number may be used again at any time, since libzmq closes connections on a thread of its own. So nothing
is done to a number: it is duplicated first, what the copy refers to is compared (inode, and our port) with what the
monitor announced, and the copy is used. A copy is never kept: it would keep open what libzmq has closed.
"""

import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Sequence

import zmq

from tensorfork.sockets.monitor import recv_connection_event

UNFINISHED = 4 << 20
"""Bytes that may have arrived on one connection beyond the messages that were received: a few of the largest, 1 MiB."""
UNFINISHED_IN_ALL = 16 << 20
"""The same for all connections together; beyond it the one with most is ended."""
_FORGIVEN = 64
"""Bytes a second that count for nothing: answers to heartbeats are no messages."""

_BYTES_RECEIVED = struct.Struct("=Q")
_BYTES_RECEIVED_AT = 128
"""Its offset in `struct tcp_info` (linux/tcp.h)."""
_TCP_INFO_SIZE = 256
_ARRIVALS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
"""An arrival wakes up who waits for input, and is reported if something is ready by then: not the input, which libzmq
has read meanwhile, but room to send."""
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | zmq.Event.CLOSED


class _Connection:
    """What is known of one connection."""

    __slots__ = ("accounted", "ended", "inode", "since", "unfinished")

    def __init__(self, inode: int, now: float) -> None:
        self.inode, self.since, self.ended = inode, now, False
        self.accounted = self.unfinished = 0
        """Bytes on the wire of the messages that were received, and those beyond them at the last look."""


class ConnectionGuard:
    """Watches the connections of one socket that is bound to a TCP port. All calls are for the socket's own thread.

    Args:
        bound: the socket, which is not bound yet; call `watch` once it is.
        unfinished: bytes that may have arrived on one connection beyond the messages that were received.
        in_all: the same for all connections together.
    """

    def __init__(
        self, bound: "zmq.Socket[bytes]", *, unfinished: int = UNFINISHED, in_all: int = UNFINISHED_IN_ALL
    ) -> None:
        self._monitor = bound.get_monitor_socket(_EVENTS)
        self._bound, self._unfinished, self._in_all = bound, unfinished, in_all
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._unfinished_in_all = 0
        self._port: int | None = None
        self.ended = 0
        """Connections that were ended."""

    def watch(self, port: int) -> None:
        """Begin: the socket is bound to this port."""
        self._port = port

    def register(self, poller: "zmq.Poller") -> None:
        """Have a poller wake up when `look` has something to do."""
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._epoll.fileno(), zmq.POLLIN)

    def received(self, frames: Sequence["zmq.Frame"]) -> None:
        """Account for a message that was received from the socket, of which the first frame is the routing id."""
        try:
            connection = self._connections.get(frames[-1].get(zmq.SRCFD))
        except zmq.ZMQError:
            return
        if connection is not None:
            connection.accounted += sum(_bytes_on_the_wire(len(frame)) for frame in frames[1:])

    def look(self, now: float) -> None:
        """Look at the connections on which something arrived, and end those that have sent too much. Never waits."""
        while self._monitor.poll(0):
            self._on_event(*recv_connection_event(self._monitor), now)
        for number, _ in self._epoll.poll(0):
            connection = self._connections.get(number)
            if connection is not None and not connection.ended:
                self._look_at(number, connection, now)
        if self._unfinished_in_all > self._in_all:
            self._end_the_largest()

    def close(self) -> None:
        """Stop watching. Call it before the socket is closed."""
        self._bound.disable_monitor()
        self._monitor.close(0)
        self._epoll.close()

    def _on_event(self, event: int, number: int, now: float) -> None:
        self._forget(number)
        if event != zmq.Event.ACCEPTED:
            return
        held = self._hold(number, None)
        if held is None:
            return  # it is gone already
        with held:
            try:
                # the descriptor of libzmq's, so that the registration ends with it
                self._epoll.register(number, _ARRIVALS)
            except FileExistsError:
                self._epoll.modify(number, _ARRIVALS)
            except OSError:
                return
            self._connections[number] = _Connection(os.fstat(held.fileno()).st_ino, now)

    def _look_at(self, number: int, connection: _Connection, now: float) -> None:
        held = self._hold(number, connection.inode)
        if held is None:
            self._forget(number)
            return
        with held:
            forgiven = int((now - connection.since) * _FORGIVEN)
            self._set(connection, max(0, _bytes_received(held) - connection.accounted - forgiven))
            if connection.unfinished > self._unfinished:
                self._end(held, connection)

    def _end_the_largest(self) -> None:
        by_size = sorted(self._connections.items(), key=lambda one: one[1].unfinished)
        while self._unfinished_in_all > self._in_all and by_size:
            number, connection = by_size.pop()
            held = self._hold(number, connection.inode)
            if held is None:
                self._forget(number)
                continue
            with held:
                self._end(held, connection)

    def _set(self, connection: _Connection, unfinished: int) -> None:
        self._unfinished_in_all += unfinished - connection.unfinished
        connection.unfinished = unfinished

    def _forget(self, number: int) -> None:
        connection = self._connections.pop(number, None)
        if connection is not None:
            self._set(connection, 0)

    def _end(self, held: socket.socket, connection: _Connection) -> None:
        connection.ended = True
        self._set(connection, 0)
        self.ended += 1
        try:
            held.shutdown(socket.SHUT_RDWR)
        except OSError as error:  # the peer was faster
            if error.errno != errno.ENOTCONN:
                raise

    def _hold(self, number: int, inode: int | None) -> socket.socket | None:
        """A descriptor of our own for a connection; None if the number means something else by now."""
        try:
            mine = os.dup(number)
        except OSError:
            return None
        status = os.fstat(mine)
        if not stat.S_ISSOCK(status.st_mode) or inode not in (None, status.st_ino):
            os.close(mine)
            return None
        held = socket.socket(fileno=mine)
        try:
            if held.getsockname()[1] == self._port:
                return held
        except (OSError, IndexError):
            pass
        held.close()
        return None


def _bytes_on_the_wire(nbytes: int) -> int:
    """Of one frame, with its header (ZMTP 3.1, section "Framing")."""
    return nbytes + (2 if nbytes <= 255 else 9)


def _bytes_received(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    received: int = _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0]
    return received
