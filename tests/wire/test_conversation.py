"""Connecting to an address: to a seed, to something else, or to nobody."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import torch
import zmq
from processes import Child, serve
from seed_leases import connection_to

import tensorfork
from tensorfork.wire import messages

pytestmark = pytest.mark.slow

PATIENCE = 30.0
SHORT = 1.0
"""Timeout of a fork that cannot succeed, in seconds."""
LATE = 5 * SHORT + 5
"""Seconds in which it must have failed."""


def model() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(1000.0)}


def fails(address: str, kind: type[tensorfork.TensorForkError], *words: str, timeout: float = SHORT) -> None:
    """A fork from the address fails in time with this error and these words, and leaves the model untouched."""
    into = {"a": torch.full((1000,), 7.0)}
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        tensorfork.fork_into(into, address, timeout=timeout)
    assert time.monotonic() - started < LATE + 5 * timeout
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(into["a"], torch.full((1000,), 7.0))


@contextmanager
def stranger(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server that is not a seed: `behave` is called with each connection, on a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def handle(connection: socket.socket) -> None:
        try:
            behave(connection)
        except OSError:
            pass  # the fork closed the connection

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threads.append(threading.Thread(target=handle, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # gone already
        for thread in threads:
            thread.join()
        for connection in connections:
            connection.close()


@contextmanager
def zeromq(kind: int, behave: Callable[[list[bytes]], list[bytes] | None]) -> Iterator[str]:
    """A ZeroMQ socket that is not a seed: `behave` gets each message and returns the answer, or None."""
    context: zmq.Context[Any] = zmq.Context()
    made = context.socket(kind)
    made.linger = 0
    port = made.bind_to_random_port("tcp://127.0.0.1")
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            if kind != zmq.PUB and made.poll(20):
                answer = behave(made.recv_multipart())
                if answer is not None:
                    made.send_multipart(answer)
            elif kind == zmq.PUB:
                ended.wait(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join()
        context.destroy(linger=0)


# Nobody there.


def test_a_host_that_does_not_exist_is_unreachable() -> None:
    fails("tcp://no-such-host.invalid:4180", tensorfork.PeerUnreachable, "no-such-host.invalid:4180", "no such host")


@pytest.mark.parametrize("host", ["x" * 70 + ".example", "a..b", "192.0.2.300"])
def test_a_host_that_cannot_exist_is_unreachable(host: str) -> None:
    fails(f"tcp://{host}:4180", tensorfork.PeerUnreachable, host, "no such host")


def test_a_closed_port_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    fails(address, tensorfork.PeerUnreachable, address, "refused", "step hello")


def test_a_host_that_accepts_and_says_nothing_is_unreachable() -> None:
    with stranger(lambda connection: None) as address:
        fails(address, tensorfork.PeerUnreachable, address, "nobody answers", "step hello")


def test_a_host_that_reads_and_says_nothing_is_unreachable() -> None:
    def read(connection: socket.socket) -> None:
        while connection.recv(4096):
            pass

    with stranger(read) as address:
        fails(address, tensorfork.PeerUnreachable, address, "step hello")


def test_a_zeromq_peer_that_answers_nothing_is_unreachable() -> None:
    with zeromq(zmq.ROUTER, lambda frames: None) as address:
        fails(address, tensorfork.PeerUnreachable, address, "it answers nothing", "step hello")


def test_a_seed_that_is_closed_is_unreachable() -> None:
    seed = tensorfork.publish(model())
    seed.close()
    fails(seed.address, tensorfork.PeerUnreachable, seed.address, "step hello")


@pytest.mark.parametrize(
    "address", ["", "nowhere", "tcp://:1", "tcp://host", "tcp://host:x", "tcp://host:70000", "::1:9"]
)
def test_what_is_not_an_address_is_a_value_error(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        tensorfork.fork_into(model(), address, timeout=SHORT)


def test_a_connection_that_is_lost_between_the_poll_and_the_call_is_waited_for() -> None:
    with tensorfork.publish({"x": torch.zeros(1)}) as seed:
        conversation = connection_to(seed.address)
        real, failed = conversation._socket, list[str]()

        class Lossy:
            def __getattr__(self, name: str) -> Any:
                if name in ("send_multipart", "recv") and name not in failed:
                    failed.append(name)
                    raise zmq.Again
                return getattr(real, name)

        conversation._socket = Lossy()  # type: ignore[assignment]
        conversation._wait = lambda what, *rest: real.poll(10, what)  # type: ignore[method-assign]
        reply, _ = conversation.request(messages.Hello("test"), messages.Welcome, time.monotonic() + PATIENCE, "hello")
        assert reply.tensors == 1
        assert failed == ["send_multipart", "recv"]
        conversation._socket = real
        conversation.close()


def test_a_conversation_whose_seed_has_died_fails_at_once_whatever_the_deadline() -> None:
    with Child(serve, model) as child:
        conversation = connection_to(child.recv())
        far = time.monotonic() + 10 * PATIENCE
        conversation.request(messages.Hello("test"), messages.Welcome, far, "hello")
        child.kill()
        for step in ("check", "channel", "release"):
            with pytest.raises(tensorfork.PeerUnreachable, match=f"or died.*{step}"):
                conversation.request(messages.Hello("test"), messages.Welcome, far, step)
        with pytest.raises(tensorfork.PeerUnreachable, match="or died"):
            conversation.send(bytes(16), b"last words", far)
        assert time.monotonic() < far - 5 * PATIENCE
        conversation.close()


def test_closing_a_conversation_waits_for_threads_in_recv_and_later_calls_fail() -> None:
    """A socket that is closed while another thread polls it ends the process."""
    listening, raised = threading.Event(), list[BaseException]()
    with tensorfork.publish({"x": torch.zeros(1)}) as seed:
        conversation = connection_to(seed.address)
        wait = conversation._wait

        def listen() -> None:
            try:
                conversation.recv(b"lease", time.monotonic() + PATIENCE)
            except BaseException as error:
                raised.append(error)

        def waiting(*args: Any) -> None:
            listening.set()
            wait(*args)

        conversation._wait = waiting  # type: ignore[method-assign]
        thread = threading.Thread(target=listen)
        thread.start()
        assert listening.wait(PATIENCE)
        conversation.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert isinstance(raised[0], tensorfork.PeerUnreachable)
        for late in (
            lambda: conversation.recv(b"lease", time.monotonic() + PATIENCE),
            lambda: conversation.send(b"lease", b"word", time.monotonic() + PATIENCE),
        ):
            with pytest.raises(tensorfork.PeerUnreachable, match="the conversation is over"):
                late()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://0.0.0.0:4180", "tcp://[::]:4180"])
def test_an_address_to_listen_on_is_not_one_to_fork_from(address: str) -> None:
    with pytest.raises(ValueError, match=r"use what seed\.address says"):
        tensorfork.fork_into(model(), address, timeout=SHORT)


# Something else there.


def test_an_http_server_is_a_protocol_error() -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)

    with stranger(answer) as address:
        fails(address, tensorfork.ProtocolError, address, "does not speak ZeroMQ", timeout=20)


def test_an_ssh_server_that_speaks_first_is_a_protocol_error() -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" + b"\0" * 64)
        while connection.recv(4096):
            pass

    with stranger(greet) as address:
        fails(address, tensorfork.ProtocolError, address, "does not speak ZeroMQ", timeout=20)


@pytest.mark.parametrize("number", range(4))
def test_a_server_of_random_bytes_is_a_protocol_error(number: int) -> None:
    noise = b"\0" + random.Random(number).randbytes(1 << 16)  # never by accident the first byte of a greeting

    def babble(connection: socket.socket) -> None:
        connection.sendall(noise)
        while connection.recv(4096):
            pass

    with stranger(babble) as address:
        fails(address, tensorfork.ProtocolError, address, "does not speak ZeroMQ", timeout=20)


def test_a_zeromq_socket_of_another_kind_is_a_protocol_error() -> None:
    with zeromq(zmq.PUB, lambda frames: None) as address:
        fails(address, tensorfork.ProtocolError, address, timeout=20)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"pong",
        b'{"error": "unknown request"}',
        msgpack.packb(["another", 1, 1, "Welcome", {}]),
        msgpack.packb({"tensorfork": 1}),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Welcome", {}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Welcome", 3]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Hello", {"library": "0"}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "NoSuchThing", {}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Pages", {"tensors": 1, "storages": 1}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Checked", {"generation": 0, "more": 1}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Refused", []]),
        b"\x91" * 100_000,
    ],
    ids=lambda answer: repr(answer[:30]),
)
def test_a_zeromq_peer_that_speaks_something_else_is_a_protocol_error(answer: bytes) -> None:
    with zeromq(zmq.ROUTER, lambda frames: [frames[0], answer]) as address:
        fails(address, tensorfork.ProtocolError, address, "step hello", timeout=20)


# Another version there.


def test_a_seed_of_another_version_is_a_protocol_error_that_names_both() -> None:
    def speak(frames: list[bytes]) -> list[bytes]:
        _, _, number, *_ = msgpack.unpackb(frames[1])
        return [frames[0], msgpack.packb([messages.MAGIC, 41, number, "Welcome", {"new": "things"}])]

    with zeromq(zmq.ROUTER, speak) as address:
        fails(address, tensorfork.ProtocolError, address, "version 41", f"version {messages.VERSION}", timeout=20)


def test_a_fork_of_another_version_is_told_so_and_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(serve, model) as child:
        address = child.recv()
        ours = messages.VERSION
        with monkeypatch.context() as patch:
            patch.setattr(messages, "VERSION", 41)
            fails(address, tensorfork.ProtocolError, address, "version 41", f"version {ours}", timeout=20)
        tensorfork.fork_into(into := {"a": torch.empty(1000)}, address, timeout=20)
        assert torch.equal(into["a"], model()["a"])


def test_a_fork_of_another_version_gets_a_refusal_with_the_number_of_its_request() -> None:
    with tensorfork.publish(model()) as seed, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(seed.address)
        dealer.send(msgpack.packb([messages.MAGIC, 41, 17, "Greetings", {"anything": 1}]))
        assert dealer.poll(10_000)
        magic, version, number, kind, body = msgpack.unpackb(dealer.recv())
        assert (magic, version, number, kind) == (messages.MAGIC, messages.VERSION, 17, "Refused")
        assert body["code"] == "version"
