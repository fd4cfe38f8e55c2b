"""The ZeroMQ transport: the suite, its connections and ports, zero-copy sending, and limits of its buffers."""

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
import zmq
from zeromq_export import OFFER, SECONDS, SITE, ServedExport, free_ports, soon, unused_channel

import tensorfork
from tensorfork import Copy, Site, TransferFailed, TransportUnavailable
from tensorfork.sockets import zero_copy
from tensorfork.sockets.waker import Waker
from tensorfork.sockets.zeromq import new_socket
from tensorfork.testing import TransportSuite
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.testing.harness import SAME_PROCESS
from tensorfork.transports.zeromq import FRAME, ZeroMQ


class TestZeroMQ(TransportSuite):
    def make(self) -> tensorfork.Transport:
        return ZeroMQ()


class TestOverOneConnection(TransportSuite):
    ways = (SAME_PROCESS,)
    big = 24 << 20

    def make(self) -> tensorfork.Transport:
        return ZeroMQ(connections=1)


# Ports and connections.


def test_each_lease_has_a_port_within_the_range_until_there_is_none_left() -> None:
    with free_ports(3) as ports:
        transport = ZeroMQ(ports=ports)
        with ServedExport(transport) as one, ServedExport(transport) as two, ServedExport(transport) as three:
            assert {one.port, two.port, three.port} == set(ports)
            three.fork()
            with pytest.raises(TransportUnavailable, match=r"every port .* is taken; give a longer range"):
                ServedExport(transport)
            two.fork()
        with ServedExport(transport) as again:  # its ports are free again
            assert again.port in ports
            again.fork()


def test_a_port_that_is_in_use_is_skipped() -> None:
    with (
        free_ports(2) as ports,
        socket.create_server(("127.0.0.1", ports[0])),
        ServedExport(ZeroMQ(ports=ports)) as served,
    ):
        assert served.port == ports[1]
        served.fork()


@pytest.mark.parametrize("connections", [2, 5, 16])
def test_any_number_of_connections_brings_the_same_bytes(connections: int) -> None:
    with ServedExport(ZeroMQ(connections=connections), (3 << 20) + 17) as served:
        served.fork()


@pytest.mark.parametrize("connections", [0, -1, 17])
def test_a_number_of_connections_out_of_bounds_is_a_value_error(connections: int) -> None:
    with pytest.raises(ValueError, match="connections must be 1 to 16"):
        ZeroMQ(connections=connections)


def test_an_address_of_another_host_is_unavailable() -> None:
    with pytest.raises(TransportUnavailable, match=r"cannot listen at 203\.0\.113\.5"):
        ZeroMQ().export(GuardedMemory("cpu", [10], 1).regions, Site("203.0.113.5", "203.0.113.5"), {}, soon())


def test_a_seed_with_a_range_of_ports_serves_forks_from_it() -> None:
    model = {"a": torch.arange(100.0)}
    with free_ports(2) as ports, tensorfork.publish(model, transports=[ZeroMQ(ports=ports)]) as seed:
        for _ in range(5):  # each lease releases its port
            assert torch.equal(tensorfork.fork(seed.address, timeout=SECONDS)["a"], model["a"])


def test_a_port_on_which_nobody_listens_is_unavailable() -> None:
    with free_ports(1) as ports:
        offer = OFFER.pack(bytes(16), ports[0], FRAME, 0)
        with pytest.raises(TransportUnavailable, match=f"port {ports[0]} at 127.0.0.1"):
            ZeroMQ().open(offer, SITE.host, [], [], unused_channel(), soon())


def test_a_host_that_does_not_exist_is_unavailable() -> None:
    offer = OFFER.pack(bytes(16), 4180, FRAME, 0)
    with pytest.raises(TransportUnavailable, match="no such host"):
        ZeroMQ().open(offer, "no-such-host.invalid", [], [], unused_channel(), soon())


# Sending without a copy, and what is buffered.


@pytest.mark.parametrize("nbytes", [1, 100_000, (9 << 20) + 17])
def test_the_same_bytes_arrive_if_libzmq_cannot_be_called_directly(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zero_copy._native is not None
    monkeypatch.setattr(zero_copy, "_native", None)
    for stable in (False, True):
        with ServedExport(ZeroMQ(), nbytes, stable=stable) as served:
            served.fork()


@pytest.fixture(params=["libzmq", "pyzmq"])
def releases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[zero_copy.Releases]:
    """Notices of released memory, from libzmq and from pyzmq, where libzmq cannot be called directly."""
    if request.param == "pyzmq":
        monkeypatch.setattr(zero_copy, "_native", None)
    releases = zero_copy.Releases()
    yield releases
    releases.close()


@pytest.fixture
def stop() -> Iterator[int]:
    """A descriptor that can be read after `SECONDS`."""
    waker = Waker()
    timer = threading.Timer(SECONDS, waker.wake)
    timer.start()
    yield waker.fileno()
    timer.cancel()
    timer.join()
    waker.close()


def test_memory_is_sent_without_a_copy(releases: zero_copy.Releases) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://memory")
        other.connect("inproc://memory")
        one.send(b"first", zmq.SNDMORE)
        zero_copy.ZeroCopySender(one, releases).send(memory.data_ptr(), memory.nbytes)
        memory.fill_(7)
        assert other.recv_multipart() == [b"first", bytes([7]) * memory.nbytes]


def test_what_is_released_is_told_once_and_not_before(releases: zero_copy.Releases, stop: int) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://memory")
        other.connect("inproc://memory")
        sender = zero_copy.ZeroCopySender(one, releases)
        for number in (0, 62, 5):
            sender.send(memory.data_ptr(), memory.nbytes)
            sender.send_notice(number)
        sender.send(memory.data_ptr(), 1)
        told: list[int] = []
        for _ in range(3):
            assert other.recv() == bytes(memory.nbytes)
            assert releases.take() == ()
            assert other.recv() == b""
            told += sender.wait(stop)
        assert other.recv() == b"\0"
        assert told == [0, 62, 5]


def test_what_is_never_sent_is_released_when_the_context_ends(releases: zero_copy.Releases, stop: int) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    told: set[int] = set()
    context, others = zmq.Context[zmq.Socket[bytes]](), zmq.Context[zmq.Socket[bytes]]()
    one, other = (new_socket(each, zmq.PAIR, max_message=1 << 20, queue=0) for each in (context, others))
    port = one.bind_to_random_port("tcp://127.0.0.1")
    other.rcvhwm = 1
    other.connect(f"tcp://127.0.0.1:{port}")
    assert one.poll(SECONDS * 1000, zmq.POLLOUT)
    sender = zero_copy.ZeroCopySender(one, releases)
    for number in range(40):  # more than the kernel buffers
        sender.send(memory.data_ptr(), memory.nbytes)
        sender.send_notice(number)
    context.destroy(linger=0)
    while len(told) < 40:
        some = sender.wait(stop)
        assert some, "not everything was released"
        told.update(some)
    others.destroy(linger=0)


def test_waiting_for_releases_ends_when_it_is_to(releases: zero_copy.Releases) -> None:
    waker = Waker()
    waker.wake()
    with zmq.Context() as context, context.socket(zmq.PAIR) as one:
        assert zero_copy.ZeroCopySender(one, releases).wait(waker.fileno()) == ()
    waker.close()


def test_sending_without_a_peer_raises(releases: zero_copy.Releases) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one:
        with pytest.raises(zmq.ZMQError) as caught:
            zero_copy.ZeroCopySender(one, releases).send(id(one), 1)
        assert caught.value.errno == zmq.EAGAIN


def test_the_kernels_send_buffer_is_limited_only_if_both_processes_are_on_one_host() -> None:
    transport, memory = ZeroMQ(), GuardedMemory("cpu", [10], 1)
    here = transport.facts(memory.regions)
    found = []
    for facts in (here, {"host": "another"}, {}):
        export = transport.export(memory.regions, SITE, facts, soon())
        found.append(export._socket.sndbuf)
        export.close(soon())
    assert found == [384 << 10, -1, -1]


def test_a_seed_that_sends_what_was_not_requested_does_not_fill_the_forks_memory() -> None:
    """The fork stops reading, so that the seed's own queue fills, which is limited to one message here."""
    mine = GuardedMemory("cpu", [1000], 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm, router.router_mandatory, router.linger = 1, True, 0
        offer = OFFER.pack(bytes(16), router.bind_to_random_port("tcp://127.0.0.1"), FRAME, 0)
        session = ZeroMQ(connections=1).open(offer, SITE.host, [], mine.regions, unused_channel(), soon())
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
            while sent < 200 and router.poll(500, zmq.POLLOUT):  # nothing in the fork receives any more
                router.send_multipart([peer, bytes(1 << 20)], zmq.NOBLOCK)
                sent += 1
        except zmq.Again:
            pass
        session.close(soon())
        assert sent < 40  # RECV_QUEUE, and what the kernel buffers
