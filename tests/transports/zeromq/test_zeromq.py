"""The ZeroMQ transport: the suite, its connections and ports, zero-copy sending, and limits of its buffers."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
import zmq
from zeromq_export import OFFER, SECONDS, ServedExport, soon, unused_channel

import tensorfork
from tensorfork import Copy, TransferFailed
from tensorfork.interpreter import process
from tensorfork.sockets import zero_copy
from tensorfork.sockets.port import Port
from tensorfork.sockets.waker import Waker
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


# Connections.


@pytest.mark.parametrize("connections", [2, 5, 16])
def test_any_number_of_connections_brings_the_same_bytes(connections: int) -> None:
    with ServedExport(ZeroMQ(connections=connections), (3 << 20) + 17) as served:
        served.fork()


@pytest.mark.parametrize("connections", [0, -1, 17])
def test_a_number_of_connections_out_of_bounds_is_a_value_error(connections: int) -> None:
    with pytest.raises(ValueError, match="connections must be 1 to 16"):
        ZeroMQ(connections=connections)


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
        zero_copy.ZeroCopySender(one).send(memory.data_ptr(), memory.nbytes)
        memory.fill_(7)
        assert other.recv_multipart() == [b"first", bytes([7]) * memory.nbytes]


def test_what_is_released_is_told_once_and_not_before(releases: zero_copy.Releases, stop: int) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://memory")
        other.connect("inproc://memory")
        sender = zero_copy.ZeroCopySender(one)
        for number in (0, 61, 5):
            sender.send(memory.data_ptr(), memory.nbytes)
            sender.send_notice(releases, number)
        sender.send(memory.data_ptr(), 1)
        told: list[int] = []
        for _ in range(3):
            assert other.recv() == bytes(memory.nbytes)
            assert releases.take() == ()
            assert other.recv() == b""
            told += releases.wait(stop, soon())
        assert other.recv() == b"\0"
        assert told == [0, 61, 5]


def test_what_is_never_sent_is_released_when_the_context_ends(releases: zero_copy.Releases, stop: int) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    told: set[int] = set()
    context, others = zmq.Context[zmq.Socket[bytes]](), zmq.Context[zmq.Socket[bytes]]()
    one, other = context.socket(zmq.PAIR), others.socket(zmq.PAIR)
    one.sndhwm = other.sndhwm = 0
    port = one.bind_to_random_port("tcp://127.0.0.1")
    other.rcvhwm = 1
    other.connect(f"tcp://127.0.0.1:{port}")
    assert one.poll(SECONDS * 1000, zmq.POLLOUT)
    sender = zero_copy.ZeroCopySender(one)
    for number in range(40):  # more than the kernel buffers
        sender.send(memory.data_ptr(), memory.nbytes)
        sender.send_notice(releases, number)
    context.destroy(linger=0)
    while len(told) < 40:
        some = releases.wait(stop, soon())
        assert some, "not everything was released"
        told.update(some)
    others.destroy(linger=0)


def test_waiting_for_releases_ends_when_it_is_to(releases: zero_copy.Releases) -> None:
    waker = Waker()
    waker.wake()
    assert releases.wait(waker.fileno(), soon()) == ()
    assert releases.wait(None, time.monotonic()) == ()
    waker.close()


def test_sending_without_a_peer_raises(releases: zero_copy.Releases) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one:
        with pytest.raises(zmq.ZMQError) as caught:
            zero_copy.ZeroCopySender(one).send(id(one), 1)
        assert caught.value.errno == zmq.EAGAIN


@pytest.mark.parametrize("same_host", [True, False])
def test_the_kernels_send_buffer_is_limited_only_if_both_processes_are_on_one_host(
    same_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(Port, "set_send_buffer", lambda self, peer, nbytes: found.append(nbytes))
    transport = ZeroMQ(connections=1)
    facts = {"host": process.host_id() if same_host else "another"}
    with ServedExport(transport, facts=facts) as served:
        served.fork()
    assert found == ([384 << 10] if same_host else [])


def test_a_seed_that_sends_what_was_not_requested_does_not_fill_the_forks_memory() -> None:
    """The fork stops reading, so that the seed's own queue fills, which is limited to one message here."""
    mine = GuardedMemory("cpu", [1000], 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.sndhwm, router.router_mandatory, router.linger = 1, True, 0
        channel = unused_channel(router.bind_to_random_port("tcp://127.0.0.1"))
        offer = OFFER.pack(bytes(16), FRAME, 0)
        session = ZeroMQ(connections=1).open(offer, "127.0.0.1", [], mine.regions, channel, soon())
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
