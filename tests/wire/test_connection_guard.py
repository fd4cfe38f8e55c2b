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

from tensorfork.sockets import connection_guard
from tensorfork.sockets.connection_guard import GUARDED_EVENTS, ConnectionGuard
from tensorfork.sockets.zeromq import recv_arrived

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

    def settle(self, done: object) -> None:
        """Look, while there is nothing to receive, until it is so."""
        assert callable(done)
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline
            self.guard.all_received()
            self.guard.look(time.monotonic())
            time.sleep(0.001)

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


def test_what_is_certainly_not_whole_has_a_limit_of_its_own(guarded: Guarded) -> None:
    guard = guarded.guard
    guard._unfinished, guard._in_all = 1 << 20, 10 << 20
    guard._stuck, guard._stuck_in_all = 100_000, 250_000
    with ExitStack() as stack:
        *peers, last = [stack.enter_context(guarded.greeted()) for _ in range(4)]
        for peer in peers:
            peer.sendall(frame(bytes(80_000), MORE))
        guarded.settle(lambda: sum(one.stuck for one in guard._suspects.values()) > 240_000)
        assert guard.ended == 0
        last.sendall(frame(bytes(30_000), MORE))  # too little to be looked at
        last.sendall(frame(bytes(80_000), MORE))
        guarded.settle(lambda: guard.ended)
        assert guard.ended == 1
        guarded.settle(lambda: len(guard._suspects) == 3)
        assert 200_000 < sum(one.stuck for one in guard._suspects.values()) <= 250_000


def test_one_connection_may_have_so_much_that_is_not_whole(guarded: Guarded) -> None:
    guard = guarded.guard
    guard._unfinished, guard._in_all = 1 << 20, 10 << 20
    guard._stuck, guard._stuck_in_all = 100_000, 1 << 20
    with guarded.greeted() as peer, guarded.greeted() as other:
        other.sendall(frame(bytes(90_000), MORE))
        peer.sendall(frame(bytes(110_000), MORE))
        guarded.settle(lambda: guard.ended)
        assert guard.ended == 1
        assert hung_up(peer)


def test_whole_messages_that_wait_to_be_received_are_not_taken_for_it(guarded: Guarded) -> None:
    guard = guarded.guard
    guard._unfinished, guard._in_all = 1 << 20, 10 << 20
    guard._stuck = guard._stuck_in_all = 100_000
    with guarded.greeted() as peer:
        for _ in range(8):
            peer.sendall(frame(bytes(50_000)))
        guarded.look_until(lambda: guard._unfinished_in_all > 350_000)
        for i in range(8):
            guarded.receive()
            for _ in range(3):
                time.sleep(0.005)  # what may be taken for stuck is, by then
                guard.look(time.monotonic())
            assert guard.ended == 0, i
        guarded.settle(lambda: not guard._suspects)


def test_a_message_of_more_parts_than_any_has_ends_its_connection(guarded: Guarded) -> None:
    guarded.guard._unfinished = 10_000
    with guarded.greeted() as peer:
        peer.sendall(b"".join(frame(b"", MORE) for _ in range(100)) + frame(b"the last"))
        assert guarded.router.poll(int(SECONDS * 1000))
        assert list(recv_arrived(guarded.router, 1, guarded.guard)) == []
        assert guarded.guard.ended == 1
        assert hung_up(peer)


def test_room_is_made_by_ending_who_has_been_idle_for_longest_and_never_who_is_to_be_kept(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, beyond = guarded.guard, [0]
    guard._unfinished = 10_000
    monkeypatch.setattr(connection_guard, "FEW", 1)
    monkeypatch.setattr(connection_guard, "descriptors_beyond", lambda: beyond[0])
    with guarded.greeted() as kept, guarded.greeted() as spoke, guarded.greeted() as silent, guarded.greeted() as last:
        kept.sendall(frame(b"something"))
        held = guarded.receive()
        guard._keep = lambda peer: peer == held
        for peer in (spoke, last):
            peer.sendall(frame(b"something"))
            guarded.receive()
        for number, expected in enumerate((guarded.peer, silent, spoke), 1):
            beyond[0] = 1
            guard._accepted = True
            guard.look(time.monotonic())
            beyond[0] = 0
            assert hung_up(expected)
            guarded.look_until(lambda left=5 - number: len(guard._connections) == left)
        assert guard.ended == 3
        beyond[0] = 5
        guard._accepted = True
        guarded.look_until(lambda: guard.ended == 4)
        assert hung_up(last)
        guarded.look_until(lambda: len(guard._connections) == 1)
        kept.sendall(frame(b"something"))
        assert guarded.receive() == held


class Unwatchable:
    """An epoll in which a number is registered already, until it is to be changed."""

    def register(self, number: int, events: int) -> None:
        raise FileExistsError

    def modify(self, number: int, events: int) -> None:
        raise OSError(9, "Bad file descriptor")


def test_a_connection_that_libzmq_closes_as_it_is_registered_is_no_error(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = guarded.guard._epoll
    monkeypatch.setattr(guarded.guard, "_epoll", Unwatchable())
    assert not guarded.guard._watch(5)
    monkeypatch.setattr(guarded.guard, "_epoll", real)
