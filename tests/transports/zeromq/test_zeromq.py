"""The ZeroMQ transport: the suite, and what only it has: connections, ports, and a port of its own for each lease."""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorfork
from tensorfork import Copy, RemoteRegion, Site, TransferFailed, TransportUnavailable
from tensorfork.sockets import zero_copy
from tensorfork.testing import TransportSuite
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.testing.harness import SAME_PROCESS
from tensorfork.transports.zeromq import FRAME, ZeroMQ

SECONDS = 20.0
SITE = Site("127.0.0.1", "127.0.0.1")
OFFER = struct.Struct("<16sI")


class TestZeroMQ(TransportSuite):
    def make(self) -> tensorfork.Transport:
        return ZeroMQ()


class TestOverOneConnection(TransportSuite):
    ways = (SAME_PROCESS,)
    big = 24 << 20

    def make(self) -> tensorfork.Transport:
        return ZeroMQ(connections=1)


def soon() -> float:
    return time.monotonic() + SECONDS


def nobody() -> QueueChannel:
    return QueueChannel(lambda _: None)


class Served:
    """An export of one region, served; and forks of it."""

    def __init__(self, transport: ZeroMQ, nbytes: int = 100_000) -> None:
        self.transport, self.nbytes = transport, nbytes
        self.memory = GuardedMemory("cpu", [nbytes], 3)
        self.export = transport.export(self.memory.regions, SITE, {}, soon())
        self.token, self.port = OFFER.unpack(self.export.offer)
        self.region = self.memory.regions[0].id
        self._error: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.export.serve(nobody())
        except BaseException as error:
            self._error.append(error)

    def fork(self, offer: bytes | None = None, seconds: float = SECONDS) -> None:
        """Pull everything, and see that it is there."""
        mine = GuardedMemory("cpu", [self.nbytes], 4)
        remote = [RemoteRegion(self.region, self.nbytes, "cpu")]
        session = self.transport.open(offer or self.export.offer, SITE.host, remote, mine.regions, nobody(), soon())
        done: list[int] = []
        try:
            copy = Copy(0, self.region, 0, mine.regions[0].id, 0, self.nbytes)
            session.pull([copy], time.monotonic() + seconds, done.append, threading.Event())
        finally:
            session.close(soon())
        mine.expect(0, 0, contents(3, [self.nbytes])[0])
        assert mine.first_difference() is None
        assert done == [0]

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.export.close(soon())
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert self._error == []


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(ZeroMQ()) as served:
        yield served
        served.fork()  # whatever the test did to it


# Its ports.


@contextmanager
def free_ports(count: int) -> Iterator[range]:
    """Neighbouring ports nobody listens on."""
    draw = random.Random(0)
    while True:
        first = draw.randrange(20_000, 30_000)
        taken = []
        try:
            for port in range(first, first + count):
                taken.append(socket.create_server(("127.0.0.1", port)))  # noqa: PERF401  # those before one that fails
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
        yield range(first, first + count)
        return


def test_each_lease_has_a_port_within_the_range_until_there_is_none_left() -> None:
    with free_ports(3) as ports:
        transport = ZeroMQ(ports=ports)
        with Served(transport) as one, Served(transport) as two, Served(transport) as three:
            assert {one.port, two.port, three.port} == set(ports)
            three.fork()
            with pytest.raises(TransportUnavailable, match=r"every port .* is taken; give a longer range"):
                Served(transport)
            two.fork()
        with Served(transport) as again:  # they have been given back
            assert again.port in ports
            again.fork()


def test_a_port_that_somebody_else_has_is_passed_over() -> None:
    with (
        free_ports(2) as ports,
        socket.create_server(("127.0.0.1", ports[0])),
        Served(ZeroMQ(ports=ports)) as served,
    ):
        assert served.port == ports[1]
        served.fork()


@pytest.mark.parametrize("connections", [2, 5, 16])
def test_any_number_of_connections_brings_the_same_bytes(connections: int) -> None:
    with Served(ZeroMQ(connections=connections), (3 << 20) + 17) as served:
        served.fork()


@pytest.mark.parametrize("connections", [0, -1, 17])
def test_a_number_of_connections_out_of_bounds_is_a_value_error(connections: int) -> None:
    with pytest.raises(ValueError, match="connections must be 1 to 16"):
        ZeroMQ(connections=connections)


def test_an_address_that_is_not_here_is_unavailable() -> None:
    with pytest.raises(TransportUnavailable, match=r"cannot listen at 203\.0\.113\.5"):
        ZeroMQ().export(GuardedMemory("cpu", [10], 1).regions, Site("203.0.113.5", "203.0.113.5"), {}, soon())


def test_a_seed_with_a_range_of_ports_serves_forks_from_it() -> None:
    model = {"a": torch.arange(100.0)}
    with free_ports(2) as ports, tensorfork.publish(model, transports=[ZeroMQ(ports=ports)]) as seed:
        for _ in range(5):  # each lease gives its port back
            assert torch.equal(tensorfork.fork(seed.address, timeout=SECONDS)["a"], model["a"])


# Its data port, and who talks to it.


@contextmanager
def dealer(served: Served) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger = 2000
        made.connect(f"tcp://127.0.0.1:{served.port}")
        yield made


def request(token: bytes, *stretches: tuple[int, int, int], number: int = 1) -> bytes:
    return struct.pack("<16sQ", token, number) + b"".join(struct.pack("<QQQ", *one) for one in stretches)


def test_who_has_the_token_is_answered_and_nobody_else(served: Served) -> None:
    wrong = bytes([served.token[0] ^ 1]) + served.token[1:]
    with dealer(served) as made:
        for token in (wrong, bytes(16), served.token[::-1]):
            made.send(request(token, (served.region, 0, 10), number=1))
        made.send(request(served.token, (served.region, 3, 10), number=2))
        assert made.poll(SECONDS * 1000)
        head, data = made.recv_multipart()
        assert struct.unpack("<QB", head) == (2, 0)
        assert data == bytes(contents(3, [served.nbytes])[0][3:13].tolist())
        assert not made.poll(0)


def test_a_fork_with_another_token_gets_nothing_by_the_deadline(served: Served) -> None:
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="by the deadline"):
        served.fork(OFFER.pack(bytes(16), served.port), seconds=0.5)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "stretch",
    [
        (0, 100_000, 1),
        (0, 99_999, 2),
        (0, 0, 100_001),
        (0, 1 << 63, 1),
        (0, (1 << 64) - 1, 1),
        (0, (1 << 64) - 1, 2),
        (0, 0, (1 << 64) - 1),
        (0, 1, (1 << 64) - 1),
        (1, 0, 1),
        (1 << 63, 0, 1),
    ],
    ids=str,
)
def test_what_lies_outside_the_regions_is_not_answered_with_bytes(
    served: Served, stretch: tuple[int, int, int]
) -> None:
    region, offset, nbytes = stretch
    with dealer(served) as made:
        made.send(request(served.token, (served.region, 0, 10), (served.region + region, offset, nbytes)))
        assert made.poll(SECONDS * 1000)
        frames = made.recv_multipart()
        assert [struct.unpack("<QB", frames[0])] == [(1, 1)]
        assert len(frames) == 1


def test_who_asks_for_nothing_is_refused_and_the_next_answer_is_whole(served: Served) -> None:
    with dealer(served) as made:
        made.send(request(served.token, number=1))
        made.send(request(served.token, (served.region, 3, 10), (served.region, 0, 0), number=2))
        for expected in ([(1, 1)], [(2, 0)]):
            assert made.poll(SECONDS * 1000)
            first, *frames = made.recv_multipart()
            assert [struct.unpack("<QB", first)] == expected
        assert frames == [bytes(contents(3, [served.nbytes])[0][3:13].tolist()), b""]


@pytest.mark.parametrize("nbytes", [1, 100_000, (9 << 20) + 17])
def test_where_libzmq_cannot_be_called_directly_the_same_bytes_arrive(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zero_copy._libzmq is not None
    monkeypatch.setattr(zero_copy, "_libzmq", None)
    with Served(ZeroMQ(), nbytes) as served:
        served.fork()


def test_memory_is_lent_and_not_copied() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://lent")
        other.connect("inproc://lent")
        zero_copy.ZeroCopySender(one).send([(memory.data_ptr(), memory.nbytes), (memory.data_ptr() + 5, 10)])
        memory.fill_(7)
        assert other.recv_multipart() == [bytes([7]) * memory.nbytes, bytes([7]) * 10]


def test_who_lends_to_nobody_is_told() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one:
        with pytest.raises(zmq.ZMQError) as caught:
            zero_copy.ZeroCopySender(one).send([(1, 0)])
        assert caught.value.errno == zmq.EAGAIN


def test_the_kernel_buffers_little_between_processes_of_one_host_and_what_it_likes_between_others() -> None:
    transport, memory = ZeroMQ(), GuardedMemory("cpu", [10], 1)
    here = transport.facts(memory.regions)
    found = []
    for facts in (here, {"host": "another"}, {}):
        export = transport.export(memory.regions, SITE, facts, soon())
        found.append(export._socket.sndbuf)
        export.close(soon())
    assert found == [256 << 10, -1, -1]


def test_a_seed_that_sends_what_nobody_asked_for_does_not_fill_the_forks_memory() -> None:
    """It is the fork that stops reading; the seed's own queue, limited here to one message, is what fills."""
    mine = GuardedMemory("cpu", [1000], 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm, router.router_mandatory, router.linger = 1, True, 0
        offer = OFFER.pack(bytes(16), router.bind_to_random_port("tcp://127.0.0.1"))
        session = ZeroMQ(connections=1).open(offer, SITE.host, [], mine.regions, nobody(), soon())
        ended = threading.Event()

        def pull() -> None:
            with pytest.raises(TransferFailed, match="cancelled"):
                session.pull([Copy(0, 1, 0, mine.regions[0].id, 0, 9)], soon(), lambda _: None, ended)

        thread = threading.Thread(target=pull)
        thread.start()
        peer, _ = router.recv_multipart()
        ended.set()
        thread.join(SECONDS)
        sent = 0
        try:
            while sent < 200 and router.poll(500, zmq.POLLOUT):  # nobody takes anything in the fork any more
                router.send_multipart([peer, bytes(1 << 20)], zmq.NOBLOCK)
                sent += 1
        except zmq.Again:
            pass
        session.close(soon())
        assert sent < 40  # AHEAD, and what the kernel buffers


def test_more_than_a_frame_holds_is_not_given_at_once() -> None:
    with Served(ZeroMQ(), 4 << 20) as served, dealer(served) as made:
        made.send(request(served.token, (served.region, 0, FRAME + 1)))
        made.send(request(served.token, *[(served.region, i << 10, 1 << 16) for i in range(64)]))
        for _ in range(2):
            assert made.poll(SECONDS * 1000)
            frames = made.recv_multipart()
            assert len(frames) == 1
            assert frames[0][-1] == 1


@settings(max_examples=100)
@given(
    messages=st.lists(
        st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"TOKEN" + tail), max_size=4),
        min_size=1,
        max_size=6,
    )
)
def test_random_messages_on_the_data_port_harm_nobody(messages: list[list[bytes]]) -> None:
    served = _shared()
    with dealer(served) as made:
        for frames in messages:
            if frames:
                made.send_multipart([frame.replace(b"TOKEN", served.token) for frame in frames])
        made.send(request(served.token, (served.region, 0, 10), number=77))
        while True:
            assert made.poll(SECONDS * 1000)
            head, *_ = made.recv_multipart()
            if struct.unpack("<QB", head)[0] == 77:
                break


@settings(max_examples=100)
@given(data=st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_on_the_data_port_harm_nobody(data: Sequence[bytes]) -> None:
    served = _shared()
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as connection:
        for some in data:
            try:
                connection.sendall(some)
            except ConnectionError:
                break  # it does not listen to such talk


_shared: Callable[[], Served]


@pytest.fixture(autouse=True, scope="module")
def _serve_for_all() -> Iterator[None]:
    """What hypothesis talks to: one for all examples."""
    global _shared
    with Served(ZeroMQ()) as served:
        _shared = lambda: served  # noqa: E731
        yield
        served.fork()


def test_a_fork_that_stops_reading_holds_up_nobody() -> None:
    with Served(ZeroMQ(), 64 << 20) as served, dealer(served) as made:
        made.rcvhwm = 1
        for i in range(200):
            made.send(request(served.token, (served.region, 0, 1 << 20), number=i))
        served.fork()


def test_idle_connections_hold_up_nobody(served: Served) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) for _ in range(100)]
    served.fork()
    for connection in idle:
        connection.close()


# A seed's end that lies.


@contextmanager
def liar(answer: Callable[[int], list[bytes] | None]) -> Iterator[bytes]:
    """A data port whose answer to each request of that number is made by `answer`; yields its offer."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            if router.poll(20):
                peer, asked = router.recv_multipart()
                frames = answer(struct.unpack_from("<16sQ", asked)[1])
                if frames is not None:
                    router.send_multipart([peer, *frames])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield OFFER.pack(bytes(16), port)
    finally:
        ended.set()
        thread.join()
        context.destroy(linger=0)


def head(number: int, status: int = 0) -> bytes:
    return struct.pack("<QB", number, status)


LIES: dict[str, Callable[[int], list[bytes] | None]] = {
    "no bytes": lambda number: [head(number)],
    "a byte too few": lambda number: [head(number), bytes(99)],
    "a byte too many": lambda number: [head(number), bytes(101)],
    "very many bytes": lambda number: [head(number), bytes(1 << 20)],
    "a frame too many": lambda number: [head(number), bytes(100), b""],
    "very many frames": lambda number: [head(number), *[bytes(100)] * 1000],
    "an answer to something else": lambda number: [head(number + 1), bytes(100)],
    "no head": lambda number: [bytes(100)],
    "an empty head": lambda number: [b"", bytes(100)],
    "a long head": lambda number: [head(number) + b"x", bytes(100)],
    "a status that is none": lambda number: [head(number, 7), bytes(100)],
    "a frame longer than any": lambda number: [head(number), bytes(FRAME + 1)],
    "nothing": lambda number: None,
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_fails_the_pull_and_touches_nothing_beside_its_place(lie: str) -> None:
    mine = GuardedMemory("cpu", [1000], 4)
    with liar(LIES[lie]) as offer:
        remote = [RemoteRegion(1, 1000, "cpu")]
        session = ZeroMQ(connections=1).open(offer, SITE.host, remote, mine.regions, nobody(), soon())
        try:
            copy = Copy(0, 1, 0, mine.regions[0].id, 200, 100)
            done: list[int] = []
            with pytest.raises(TransferFailed):
                session.pull([copy], time.monotonic() + 0.5, done.append, threading.Event())
            assert done == ([0] if "frame too many" in lie or "many frames" in lie else [])  # its bytes had come
            mine.expect(0, 200, mine.view(0, 200, 100))  # what is inside of its place counts for nothing
            assert mine.first_difference() is None
            with pytest.raises(TransferFailed, match="failed before"):
                session.pull([copy], soon(), done.append, threading.Event())
        finally:
            session.close(soon())


def test_a_connection_that_ends_while_an_answer_is_awaited_fails_the_pull_at_once() -> None:
    mine = GuardedMemory("cpu", [1000], 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        offer = OFFER.pack(bytes(16), router.bind_to_random_port("tcp://127.0.0.1"))

        def hang_up() -> None:
            router.recv_multipart()
            router.close(linger=0)

        thread = threading.Thread(target=hang_up)
        thread.start()
        session = ZeroMQ(connections=1).open(offer, SITE.host, [], mine.regions, nobody(), soon())
        started = time.monotonic()
        try:
            with pytest.raises(TransferFailed, match="closed the connection, or died"):
                session.pull([Copy(0, 1, 0, mine.regions[0].id, 0, 9)], soon(), lambda _: None, threading.Event())
        finally:
            session.close(soon())
            thread.join()
        assert time.monotonic() - started < SECONDS / 2


def test_a_port_where_nobody_listens_fails_by_the_deadline() -> None:
    with free_ports(1) as ports:
        mine = GuardedMemory("cpu", [1000], 4)
        offer = OFFER.pack(bytes(16), ports[0])
        started = time.monotonic()
        session = ZeroMQ().open(offer, SITE.host, [RemoteRegion(1, 1000, "cpu")], mine.regions, nobody(), soon())
        try:
            copy = Copy(0, 1, 0, mine.regions[0].id, 200, 100)
            with pytest.raises(TransferFailed):
                session.pull([copy], time.monotonic() + 0.5, lambda _: None, threading.Event())
        finally:
            session.close(soon())
        assert time.monotonic() - started < 5


def test_a_host_that_is_none_is_unavailable() -> None:
    offer = OFFER.pack(bytes(16), 4180)
    with pytest.raises(TransportUnavailable, match="no such host"):
        ZeroMQ().open(offer, "no-such-host.invalid", [], [], nobody(), soon())
