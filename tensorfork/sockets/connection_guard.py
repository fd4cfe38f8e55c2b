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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import zmq

from tensorfork.interpreter.limits import descriptors_beyond
from tensorfork.sockets.monitor import recv_connection_event

UNFINISHED = 4 << 20
"""Bytes that may have arrived on one connection beyond the messages that were received: a few of the largest, 1 MiB."""
UNFINISHED_IN_ALL = 16 << 20
"""The same for all connections together; beyond it the one with most is ended."""
STUCK = 9 << 17
"""Bytes of which it is certain that they are of one message that is not whole yet: one of the largest. They are counted
by themselves because a part of no bytes takes 2 on the wire, and 64 in libzmq: 2 MiB can be 64 MiB."""
STUCK_IN_ALL = 9 << 17
"""The same for all connections together."""
_NOTED = 64 << 10
"""Bytes beyond the messages that were received from which on it is found out what they are of."""
_SETTLED = 0.002
"""Seconds in which libzmq has made messages of bytes that have arrived, if they can be made of them."""
FEW = 16
"""Connections that a port has in any case, however few descriptors there are."""
_FORGIVEN = 64
"""Bytes a second that count for nothing: answers to heartbeats are no messages."""

_BYTES_RECEIVED = struct.Struct("=Q")
_BYTES_RECEIVED_AT = 128
"""Its offset in `struct tcp_info` (linux/tcp.h)."""
_TCP_INFO_SIZE = 256
_ARRIVALS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
"""An arrival wakes up who waits for input, and is reported if something is ready by then: not the input, which libzmq
has read meanwhile, but room to send."""
GUARDED_EVENTS = zmq.Event.ACCEPTED | zmq.Event.CONNECTED | zmq.Event.DISCONNECTED
"""What the monitor of a guarded socket must report."""


class ConnectionKey(NamedTuple):
    """A connection: the number of its descriptor, and its inode, which no other connection has."""

    number: int
    inode: int

    def is_closed(self) -> bool:
        """Whether its descriptor is closed."""
        try:
            return os.fstat(self.number).st_ino != self.inode
        except OSError:
            return True


_BEGINNINGS = zmq.Event.ACCEPTED, zmq.Event.CONNECTED


class _Connection:
    """What is known of one connection."""

    __slots__ = ("accounted", "ended", "heard", "inode", "noted", "peer", "since", "spoke", "stuck", "unfinished")

    def __init__(self, inode: int, now: float) -> None:
        self.inode, self.since, self.heard, self.ended = inode, now, now, False
        self.peer: bytes | None = None
        """Its routing id, once a message has come."""
        self.spoke = 0.0
        """When the last message came; 0 before the first."""
        self.accounted = self.unfinished = 0
        """Bytes on the wire of the messages that were received, and those beyond them at the last look."""
        self.noted: tuple[float, int, int, int] | None = None
        """At an earlier look: the time, the messages received on all connections, the bytes of this one's messages, and
        the bytes beyond them."""
        self.stuck = 0
        """Bytes of a message that is not whole."""


class ConnectionGuard:
    """Watches the connections of one socket that is bound or connected to a TCP port. All calls are for the socket's
    own thread.

    Args:
        monitor: the socket's, of `GUARDED_EVENTS`. The socket is not bound yet; call `watch` once it is.
        unfinished: bytes that may have arrived on one connection beyond the messages that were received.
        in_all: the same for all connections together.
        stuck, stuck_in_all: bytes of messages that are certainly not whole, of one connection and of all.
        on_gone: called with a routing id whose connection has ended, after the last message that came over it.
        keep: whether a connection is not to be ended to make room for others, by its routing id.
        on_event: called with each event of the monitor; may raise.
    """

    def __init__(
        self,
        monitor: "zmq.Socket[bytes]",
        *,
        unfinished: int = UNFINISHED,
        in_all: int = UNFINISHED_IN_ALL,
        stuck: int = STUCK,
        stuck_in_all: int = STUCK_IN_ALL,
        on_gone: Callable[[bytes], object] = lambda peer: None,
        keep: Callable[[bytes], bool] = lambda peer: False,
        on_event: Callable[[zmq.Event], object] = lambda event: None,
    ) -> None:
        self._monitor, self._on_gone, self._keep, self._on_zmq_event = monitor, on_gone, keep, on_event
        self._unfinished, self._in_all = unfinished, in_all
        self._stuck, self._stuck_in_all = stuck, stuck_in_all
        self._suspects: dict[int, _Connection] = {}
        self._messages, self._all_received = 0, 0.0
        self._accepted = False
        """Whether there may be too many descriptors."""
        self._epoll = select.epoll()
        self._spare = os.dup(self._epoll.fileno())
        """A descriptor of our own that a connection is duplicated to: so that works where none is left, too."""
        self._connections: dict[int, _Connection] = {}
        self._gone: list[bytes] = []
        self._unfinished_in_all = 0
        self._port: int | None = None
        self._is_bound = True
        self._looked = time.monotonic()
        self.silence = self.unwatched = 0.0
        """Of the connection that ended last: seconds for which nothing had come, and for how many of them, the last
        ones, nobody had looked."""
        self.ended = 0
        """Connections that were ended."""

    def watch(self, port: int, *, bound: bool = True) -> None:
        """Begin: the socket is bound to this port, or connected to this one of its peer's."""
        self._port, self._is_bound = port, bound

    def allow(self, unfinished: int) -> None:
        """Change how much may have arrived on one connection, and on all, beyond what was received."""
        self._unfinished = self._in_all = self._stuck = self._stuck_in_all = unfinished

    def arrived(self, seconds: float) -> bool:
        """Wait so long at most until `look` may have something to do on a connection. For any thread."""
        poll = select.poll()
        poll.register(self._epoll.fileno(), select.POLLIN)
        return bool(poll.poll(int(seconds * 1000)))

    def register(self, poller: "zmq.Poller") -> None:
        """Have a poller wake up when `look` has something to do."""
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self.arrivals(), zmq.POLLIN)

    def arrivals(self) -> int:
        """The descriptor that can be read when something has arrived on a connection, or may be sent again."""
        return self._epoll.fileno()

    def is_due(self, now: float) -> bool:
        """Whether `look` has something to do, whatever has arrived."""
        due = self.next_look
        has_event = int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN
        return bool(self._gone or has_event) or (due is not None and now >= due)

    def all_received(self) -> None:
        """Every whole message has been received."""
        self._all_received = time.monotonic()

    @property
    def next_look(self) -> float | None:
        """When `look` has something to do in any case; None if only events matter."""
        return self._looked + _SETTLED if self._suspects or self._accepted else None

    def received(self, frames: Sequence["zmq.Frame"], *, is_whole: bool = True) -> None:
        """Account for a message that was received from the socket, of which the first frame is the routing id if it is
        bound. If these are not all of its frames, its connection is ended.
        """
        try:
            number = frames[-1].get(zmq.SRCFD)
        except zmq.ZMQError:
            return
        now = time.monotonic()
        self._messages += 1
        self._handle_events(now)  # the connection's beginning came before its message
        connection = self._connections.get(number)
        peer, sent = (frames[0].bytes, frames[1:]) if self._is_bound else (None, frames)
        if connection is not None:
            connection.accounted += sum(_bytes_on_the_wire(len(frame)) for frame in sent)
            connection.peer, connection.spoke = peer, now
            if not is_whole:
                self._end_at(number, connection)
        elif peer is not None:
            self._gone.append(peer)

    @property
    def unfinished(self) -> int:
        """Bytes that had arrived at the last look, on all connections, beyond the messages that were received."""
        return self._unfinished_in_all

    def account(self, *nbytes: int) -> None:
        """The same for a message of frames of so many bytes, of a socket that is connected: it has one connection."""
        self._messages += 1
        for connection in self._connections.values():
            connection.accounted += sum(map(_bytes_on_the_wire, nbytes))

    def connection_of(self, frames: Sequence["zmq.Frame"]) -> ConnectionKey | None:
        """The connection that a message came over of which `received` was told; None if it has gone meanwhile."""
        try:
            number = frames[-1].get(zmq.SRCFD)
        except zmq.ZMQError:
            return None
        connection = self._connections.get(number)
        return None if connection is None else ConnectionKey(number, connection.inode)

    def set_send_buffer(self, key: ConnectionKey, nbytes: int) -> None:
        """Set the kernel's send buffer of a connection, unless it has gone."""
        with self._held(*key) as held:
            if held is not None:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def look(self, now: float) -> bool:
        """Look at the connections on which something arrived, and end those that have sent too much. Never waits.

        Returns whether something had arrived, or could be sent again.
        """
        self._handle_events(now)
        arrived = [number for number, _ in self._epoll.poll(0)]
        for number in {*arrived, *self._suspects}:
            connection = self._connections.get(number)
            if connection is not None and not connection.ended:
                self._look_at(number, connection, now)
        while self._unfinished_in_all > self._in_all and self._connections:
            self._end_at(*max(self._connections.items(), key=lambda one: one[1].unfinished))
        while sum(one.stuck for one in self._suspects.values()) > self._stuck_in_all:
            self._end_at(*max(self._suspects.items(), key=lambda one: one[1].stuck))
        if self._accepted:
            self._make_room()
        gone, self._gone = self._gone, []
        for peer in gone:
            self._on_gone(peer)
        self._looked = now
        return bool(arrived)

    def end(self, peer: bytes) -> None:
        """End the connection of this routing id, if there is one. `on_gone` follows."""
        for number, connection in list(self._connections.items()):
            if connection.peer == peer and not connection.ended:
                self._end_at(number, connection)

    def close(self) -> None:
        """Stop watching. Call it before the monitor is closed. A second call does nothing."""
        if self._epoll.closed:
            return
        self._epoll.close()
        os.close(self._spare)

    def _handle_events(self, now: float) -> None:
        while True:
            try:
                event = recv_connection_event(self._monitor)
            except zmq.Again:
                return
            self._on_event(*event, now)
            self._on_zmq_event(event[0])

    def _on_event(self, event: int, number: int, now: float) -> None:
        if event == zmq.Event.DISCONNECTED and number in self._connections:
            self.silence, self.unwatched = now - self._connections[number].heard, now - self._looked
        if event == zmq.Event.DISCONNECTED or event in _BEGINNINGS:
            self._forget(number)
        if event not in _BEGINNINGS:
            return
        with self._held(number, None) as held:
            if held is None:
                return  # it is gone already
            self._connections[number] = connection = _Connection(os.fstat(held.fileno()).st_ino, now)
            if not self._watch(number):
                self._end(held, connection)
        self._accepted = self._is_bound

    def _watch(self, number: int) -> bool:
        """Have the epoll tell of arrivals. False where libzmq has closed the descriptor, or it cannot be watched."""
        try:
            # the descriptor of libzmq's, so that the registration ends with it
            try:
                self._epoll.register(number, _ARRIVALS)
            except FileExistsError:
                self._epoll.modify(number, _ARRIVALS)
        except OSError:
            return False
        return True

    def _make_room(self) -> None:
        """End connections if this process has few descriptors left: where none is, libzmq tries without a pause to
        accept who is waiting. Those that have been idle for longest; before all others those that have said nothing.
        """
        live = [one for one in self._connections.items() if not one[1].ended]
        closing = len(self._connections) - len(live)
        excess = descriptors_beyond() - closing
        idle = [one for one in live if one[1].peer is None or not self._keep(one[1].peer)]
        idle.sort(key=lambda one: (one[1].spoke, one[1].since))
        longest = idle[: max(0, min(excess, len(live) - FEW))]
        for number, connection in longest:
            self._end_at(number, connection)
        self._accepted = bool(longest) or closing > 0  # libzmq closes them, and accepts others in their place

    def _look_at(self, number: int, connection: _Connection, now: float) -> None:
        with self._held(number, connection.inode) as held:
            if held is None:
                self._forget(number)
                return
            connection.heard = now
            forgiven = int((now - connection.since) * _FORGIVEN)
            self._set(connection, max(0, _bytes_received(held) - connection.accounted - forgiven))
            self._find_stuck(number, connection, now)
            if connection.unfinished > self._unfinished or connection.stuck > self._stuck:
                self._end(held, connection)

    def _find_stuck(self, number: int, connection: _Connection, now: float) -> None:
        """Find out how much of what is unfinished is of a message that is not whole.

        That are the bytes that had arrived at an earlier look, if since then libzmq has had time to make messages of
        them, every connection has had its turn, and none of this one's was received.
        """
        if connection.unfinished <= _NOTED:
            connection.noted, connection.stuck = None, 0
            self._suspects.pop(number, None)
            return
        self._suspects[number] = connection
        if connection.noted is not None and connection.noted[2] == connection.accounted:
            then, messages, _, unfinished = connection.noted
            had_turn = self._all_received >= then + _SETTLED or self._messages - messages >= len(self._connections)
            if now - then < _SETTLED or not had_turn:
                return
            connection.stuck = unfinished
        else:
            connection.stuck = 0
        connection.noted = now, self._messages, connection.accounted, connection.unfinished

    def _set(self, connection: _Connection, unfinished: int) -> None:
        self._unfinished_in_all += unfinished - connection.unfinished
        connection.unfinished = unfinished

    def _forget(self, number: int) -> None:
        connection = self._connections.pop(number, None)
        if connection is not None:
            self._set(connection, 0)
            self._suspects.pop(number, None)
            if connection.peer is not None:
                self._gone.append(connection.peer)

    def _end_at(self, number: int, connection: _Connection) -> None:
        with self._held(number, connection.inode) as held:
            if held is None:
                self._forget(number)
            else:
                self._end(held, connection)

    def _end(self, held: socket.socket, connection: _Connection) -> None:
        connection.ended = True
        self._set(connection, 0)
        connection.stuck = 0
        self.ended += 1
        try:
            held.shutdown(socket.SHUT_RDWR)
        except OSError as error:  # the peer was faster
            if error.errno != errno.ENOTCONN:
                raise

    @contextmanager
    def _held(self, number: int, inode: int | None) -> Iterator[socket.socket | None]:
        """A descriptor of our own for a connection; None if the number means something else by now."""
        try:
            os.dup2(number, self._spare, inheritable=False)
        except OSError:
            yield None
            return
        held: socket.socket | None = None
        try:
            status = os.fstat(self._spare)
            if stat.S_ISSOCK(status.st_mode) and inode in (None, status.st_ino):
                held = socket.socket(fileno=self._spare)
            yield held if held is not None and self._is_ours(held) else None
        finally:
            if held is not None:
                held.detach()
            os.dup2(self._epoll.fileno(), self._spare, inheritable=False)

    def _is_ours(self, held: socket.socket) -> bool:
        try:
            return bool((held.getsockname() if self._is_bound else held.getpeername())[1] == self._port)
        except (OSError, IndexError):
            return False


def _bytes_on_the_wire(nbytes: int) -> int:
    """Of one frame, with its header (ZMTP 3.1, section "Framing")."""
    return nbytes + (2 if nbytes <= 255 else 9)


def _bytes_received(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    received: int = _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_AT)[0]
    return received
