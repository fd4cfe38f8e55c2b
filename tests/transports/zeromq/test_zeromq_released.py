"""Memory that libzmq was lent is not read once it counts as free, however and whenever peers go away."""

import random
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
import zmq
from processes import Child
from raw_readers import LITTLE, ask, connect, hang_up, nobody_reads_free_slots, read
from zeromq_export import SECONDS, ServedExport, request, started_port

from tensorfork import Site
from tensorfork.memory import host_slots
from tensorfork.sockets.port import Port
from tensorfork.sockets.zero_copy import Releases, ZeroCopySender
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.transports.zeromq.export import MAX_WAITING

pytestmark = pytest.mark.slow

NBYTES = 8 << 20
LEASES, PEERS = 25, 8


class Trouble:
    """Peers that ask for much, read some of it, and hang up in the middle of an answer; each on a thread."""

    def __init__(self, draw: random.Random, served: ServedExport) -> None:
        self._served, self._peers, self._threads = served, list[socket.socket](), list[threading.Thread]()
        for _ in range(PEERS):
            room, nbytes = draw.choice([(LITTLE, 1), (256 << 10, served.frame), (1 << 20, 3 * served.frame)])
            peer = connect(("127.0.0.1", served.port or 0), room)
            times, abruptly = draw.randint(1, MAX_WAITING // PEERS // 2), draw.random() < 0.5
            ask(peer, request(served.token, (served.region, draw.randrange(1000), served.frame)), times)
            nbytes = min((times - 1) * served.frame, draw.randint(1, nbytes))
            thread = threading.Thread(target=self._read, args=(peer, nbytes, abruptly))
            thread.start()
            self._peers.append(peer)
            self._threads.append(thread)

    def _read(self, peer: socket.socket, nbytes: int, abruptly: bool) -> None:
        read(peer, nbytes)
        hang_up(peer, abruptly)

    def end(self) -> None:
        """Wait until all have hung up. Those that wait for answers get none once the lease has ended."""
        for thread in self._threads:
            thread.join(0 if self._served.export._closing.is_set() else SECONDS)
        for peer in self._peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


def lose_notices(draw: random.Random, port: Port) -> None:
    """Have some connections end between an answer and the notice that would tell of its release."""
    send, no_notice = ZeroCopySender.send_notice, Releases.no_notice

    def send_or_not(self: ZeroCopySender, releases: Releases, number: int) -> None:
        if draw.random() < 0.2:
            self._socket.send(b"")  # so that the message is whole
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        send(self, releases, number)

    def end(self: Releases, number: int, is_closed: Any) -> None:
        no_notice(self, number, is_closed)
        port.end(is_closed.__self__.id)

    ZeroCopySender.send_notice, Releases.no_notice = send_or_not, end  # type: ignore[method-assign]


def serve_in_trouble(pipe: Any, seed: int, lose: bool) -> None:
    """Leases whose free slots nobody can read, and peers that hang up in the middle of answers."""
    draw = random.Random(seed)
    with nobody_reads_free_slots() as given_back, started_port() as port:
        if lose:
            lose_notices(random.Random(seed), port)
        site = Site("127.0.0.1", "127.0.0.1", port=port)
        for _ in range(LEASES):
            with ServedExport(ZeroMQ(), NBYTES, site) as served:
                peers = Trouble(draw, served)
                if draw.random() < 0.5:
                    peers.end()
                    if not lose:
                        served.fork(sizes=[1 << 20])
            peers.end()
        pipe.send((given_back[0], host_slots.pool()._memory is None))


@pytest.mark.parametrize("lose", [False, True], ids=["notices come", "notices are lost"])
def test_no_slot_is_read_once_it_is_free_while_peers_hang_up_in_the_middle_of_answers(lose: bool) -> None:
    with Child(serve_in_trouble, 1, lose) as child:
        given_back, pool_is_empty = child.recv()
        assert given_back > LEASES
        assert pool_is_empty


def lend_in_trouble(pipe: Any) -> None:
    """The same with memory that is lent itself: it is unmapped as soon as the lease has ended."""
    draw = random.Random(3)
    unmapped = 0
    with started_port() as port:
        site = Site("127.0.0.1", "127.0.0.1", port=port)
        for _ in range(LEASES):
            served = ServedExport(ZeroMQ(), NBYTES, site, stable=True)
            peers = Trouble(draw, served)
            if draw.random() < 0.5:
                peers.end()
            with served:
                pass
            served.memory.unmap()
            unmapped += 1
            peers.end()
            served.memory.map()
    pipe.send(unmapped)


def test_memory_that_was_lent_itself_is_not_read_once_the_lease_has_ended() -> None:
    with Child(lend_in_trouble) as child:
        assert child.recv() == LEASES
