"""The guard of connections: nothing is done to a descriptor whose number means something else by now."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import zmq
from hostile import GREETING, MORE, READY, frame, hung_up
from scarcity import descriptors

from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard

SECONDS = 20.0


class Guarded:
    """A bound socket, its guard, and a connection that has sent nothing but its greeting."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", limit: int) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.gone: list[bytes] = []
        self.monitor = self.router.get_monitor_socket(GUARDED_EVENTS)
        self.guard = ConnectionGuard(self.monitor, unfinished=limit, in_all=10 * limit, on_gone=self.gone.append)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.guard.watch(self.port)
        self.peer = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        self.look_until(lambda: bool(self.guard._connections))

    @contextmanager
    def greeted(self) -> Iterator[socket.socket]:
        """Another connection, after its handshake."""
        with socket.create_connection(("127.0.0.1", self.port), SECONDS) as peer:
            peer.sendall(GREETING + READY)
            received = b""
            while len(received) <= len(GREETING):
                received += peer.recv(4096)
            yield peer

    def receive(self) -> bytes:
        """A message that the guard is told of; its routing id."""
        assert self.router.poll(int(SECONDS * 1000))
        frames = self.router.recv_multipart(copy=False)
        self.guard.received(frames)
        return frames[0].bytes

    def look_until(self, done: object) -> None:
        assert callable(done)
        poller = zmq.Poller()
        self.guard.register(poller)
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline
            poller.poll(100)
            self.guard.look(time.monotonic())

    def close(self) -> None:
        self.peer.close()
        self.guard.close()
        self.router.disable_monitor()
        self.monitor.close(0)
        self.router.close(0)


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    with zmq.Context() as context:
        made = Guarded(context, 100)
        yield made
        made.close()


def test_who_sends_more_than_may_be_unfinished_is_ended(guarded: Guarded) -> None:
    guarded.guard._unfinished = 1000
    with guarded.greeted() as peer:
        guarded.look_until(lambda: True)
        assert guarded.guard.ended == 0
        peer.sendall(frame(bytes(2000), MORE))
        guarded.look_until(lambda: guarded.guard.ended)
        assert hung_up(peer)


def test_of_all_connections_those_with_most_unfinished_are_ended_until_the_rest_is_little_enough(
    guarded: Guarded,
) -> None:
    """Each of them has less than one may have."""
    guard = guarded.guard
    guard._unfinished, guard._in_all = 10_000, 12_000
    with ExitStack() as stack:
        *peers, largest = [stack.enter_context(guarded.greeted()) for _ in range(4)]
        for size, peer in zip((1000, 4000, 5000), peers, strict=True):
            peer.sendall(frame(bytes(size), MORE))
        guarded.look_until(lambda: guard._unfinished_in_all > 10_000)
        assert guard.ended == 0
        largest.sendall(frame(bytes(6000), MORE))
        guarded.look_until(lambda: guard.ended)
        assert hung_up(largest)
        assert guard.ended == 1
        assert 10_000 < guard._unfinished_in_all <= 12_000
        assert guard._unfinished_in_all == sum(one.unfinished for one in guard._connections.values())


def test_a_number_that_is_used_again_is_left_alone(guarded: Guarded) -> None:
    """libzmq has closed the connection, and the application has got its number, before the guard looks."""
    (number,) = guarded.guard._connections
    theirs, ours = socket.socketpair()
    with theirs, ours:
        kept = os.dup(number)
        try:
            os.dup2(theirs.fileno(), number)
            guarded.guard._look_at(number, guarded.guard._connections[number], time.monotonic())
            assert not guarded.guard._connections
            assert guarded.guard.ended == 0
            theirs.sendall(b"still open")
            assert ours.recv(100) == b"still open"
        finally:
            os.dup2(kept, number)
            os.close(kept)


def test_a_connection_that_ended_is_forgotten(guarded: Guarded) -> None:
    guarded.peer.close()
    guarded.look_until(lambda: not guarded.guard._connections)
    assert guarded.guard.ended == 0


def test_who_sent_a_message_and_is_gone_is_told_once(guarded: Guarded) -> None:
    guarded.guard._unfinished = 1000
    with guarded.greeted() as peer:
        peer.sendall(frame(b"something"))
        routing_id = guarded.receive()
        guarded.look_until(lambda: True)
        assert guarded.gone == []
    guarded.look_until(lambda: guarded.gone)
    guarded.peer.close()
    guarded.look_until(lambda: not guarded.guard._connections)
    assert guarded.gone == [routing_id]


def test_one_connection_is_ended_and_no_other(guarded: Guarded) -> None:
    guarded.guard._unfinished = 1000
    with guarded.greeted() as one, guarded.greeted() as other:
        one.sendall(frame(b"one"))
        first = guarded.receive()
        other.sendall(frame(b"other"))
        guarded.receive()
        guarded.guard.end(first)
        guarded.look_until(lambda: guarded.gone)
        assert guarded.gone == [first]
        assert hung_up(one)
        other.sendall(frame(b"other"))
        guarded.receive()


def test_a_connection_is_ended_where_no_descriptor_is_left(guarded: Guarded) -> None:
    guarded.guard._unfinished = 1000
    with guarded.greeted() as peer:
        guarded.look_until(lambda: len(guarded.guard._connections) == 2)
        with descriptors(0):
            peer.sendall(frame(bytes(2000), MORE))
            guarded.look_until(lambda: guarded.guard.ended)
        assert hung_up(peer)
