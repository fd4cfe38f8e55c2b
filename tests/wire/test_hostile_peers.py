"""Whatever is sent to a seed's port, it serves the next fork. Whatever a seed sends, the fork is right or an error."""

import itertools
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import psutil
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child, serve

import tensorfork
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation

SECONDS = 20.0
"""Timeout of what should succeed."""
MUCH = 64 << 20
"""Bytes of memory that no peer may cost a seed."""


def model() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.arange(100.0) + i for i in range(600)}


class Seed:
    """A seed in a process of its own."""

    def __init__(self, child: Child) -> None:
        self.child, self.address = child, child.recv()
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        self.at = (host, int(port))

    def serves(self) -> None:
        """Check that it still serves a fork, and has logged no error."""
        found = tensorfork.fork(self.address, timeout=SECONDS)
        assert all(torch.equal(found[name], tensor) for name, tensor in model().items())
        assert self.child.request("errors") == []

    def memory(self) -> int:
        return psutil.Process(self.child.pid).memory_info().rss


@pytest.fixture(scope="module")
def running() -> Iterator[Seed]:
    with Child(serve, model) as child:
        seed = Seed(child)
        seed.serves()
        yield seed


@pytest.fixture
def seed(running: Seed) -> Iterator[Seed]:
    before = running.memory()
    yield running
    running.serves()
    assert running.memory() - before < MUCH


# ZMTP by hand (https://rfc.zeromq.org/spec/23/).

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_PROPERTIES = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER\x08Identity" + struct.pack(">I", 0)
READY = bytes([4, len(_PROPERTIES)]) + _PROPERTIES
MORE, LONG = 1, 2


def frame(body: bytes, flags: int = 0) -> bytes:
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


@contextmanager
def raw(seed: Seed, *data: bytes) -> Iterator[socket.socket]:
    """A plain TCP connection on which these bytes were sent."""
    with socket.create_connection(seed.at, timeout=SECONDS) as connection:
        send(connection, b"".join(data))
        yield connection


@contextmanager
def zmtp(seed: Seed) -> Iterator[socket.socket]:
    """A plain TCP connection after ZeroMQ's handshake."""
    with raw(seed, GREETING, READY) as connection:
        got = b""
        while len(got) < len(GREETING) + 10:
            received = connection.recv(4096)
            assert received, "the seed breaks the handshake off"
            got += received
        yield connection


def send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except (ConnectionError, TimeoutError):
        pass  # the seed has closed the connection


def hung_up(connection: socket.socket) -> bool:
    """Whether the seed closes the connection."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@contextmanager
def dealer(seed: Seed) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as made:
        made.linger = 2000
        made.connect(seed.address)
        yield made


def answers(made: Any) -> list[Any]:
    """The seed's replies to everything that was sent before; a `Hello`, which it always answers, marks the end."""
    number = 0xABCDEF
    made.send(messages.encode(messages.Hello("test"), number))
    found = []
    while True:
        assert made.poll(SECONDS * 1000), "the seed does not answer any more"
        got, message = messages.decode(made.recv_multipart()[0], messages.REPLIES)
        if got == number and isinstance(message, messages.Welcome):
            return found
        found.append(message)


# Bytes.


@settings(max_examples=150)
@given(data=st.lists(st.binary(max_size=300), max_size=4))
def test_random_bytes_on_the_port_harm_nobody(running: Seed, data: list[bytes]) -> None:
    with raw(running, *data):
        pass


@settings(max_examples=100)
@given(data=st.binary(max_size=200), cut=st.integers(0, len(GREETING + READY)))
def test_a_handshake_that_goes_astray_harms_nobody(running: Seed, data: bytes, cut: int) -> None:
    with raw(running, (GREETING + READY)[:cut], data):
        pass


@settings(max_examples=100)
@given(data=st.binary(min_size=1, max_size=500))
def test_random_bytes_after_a_handshake_harm_nobody(running: Seed, data: bytes) -> None:
    with zmtp(running) as connection:
        send(connection, data)


def test_after_all_those_bytes_a_fork_is_served(seed: Seed) -> None:
    seed.serves()


@pytest.mark.parametrize("length", [messages.MAX_MESSAGE + 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_frame_announced_as_huge_ends_the_connection(seed: Seed, length: int) -> None:
    with zmtp(seed) as connection:
        send(connection, bytes([LONG]) + struct.pack(">Q", length) + b"x" * 1000)
        assert hung_up(connection)


def test_a_frame_that_never_ends_holds_up_nobody(seed: Seed) -> None:
    with zmtp(seed) as connection:
        send(connection, bytes([LONG]) + struct.pack(">Q", messages.MAX_MESSAGE) + b"x" * 1000)
        seed.serves()


def test_a_message_of_very_many_frames_is_dropped(seed: Seed) -> None:
    with dealer(seed) as made:
        made.send_multipart([messages.encode(messages.Hello("test"), 5), *[b""] * 20_000])
        assert answers(made) == []


# Messages.

plain = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=20)
anything = st.recursive(
    plain | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)
kinds = st.sampled_from([kind.__name__ for kind in (*messages.REQUESTS, *messages.REPLIES)]) | st.text(max_size=8)
some_lease = bytes(16)
requests = st.sampled_from(
    [
        messages.Hello("0"),
        messages.GetLayout(),
        messages.TakeLease("no such transport", {"a": [1, None]}, 1.0, True),
        messages.Say(some_lease),
        messages.GetDigests(some_lease),
        messages.CheckLease(some_lease, True),
    ]
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good request with one thing about it changed."""
    envelope = msgpack.unpackb(messages.encode(draw(requests), draw(st.integers(0, 1 << 40))))
    body = envelope[4]
    how = draw(st.sampled_from(["envelope", "body", "field", "more", "less", "bytes", "cut", "longer"]))
    if how == "envelope":
        envelope[draw(st.integers(0, 4))] = draw(anything)
    elif how == "body":
        envelope[4] = draw(anything)
    elif how == "field" and body:
        body[draw(st.sampled_from(sorted(body)))] = draw(anything)
    elif how == "more":
        body[draw(st.text(max_size=8))] = draw(anything)
    elif how == "less" and body:
        del body[draw(st.sampled_from(sorted(body)))]
    packed = bytearray(msgpack.packb(envelope))
    if how == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            packed[draw(st.integers(0, len(packed) - 1))] = draw(st.integers(0, 255))
    elif how == "cut":
        del packed[draw(st.integers(0, len(packed) - 1)) :]
    elif how == "longer":
        packed += draw(st.binary(min_size=1, max_size=20))
    return bytes(packed)


def survives(seed: Seed, frames: Sequence[bytes]) -> None:
    """Send these; the seed refuses what it answers at all, and serves on."""
    with dealer(seed) as made:
        for message in frames:
            made.send(message)
        for answer in answers(made):
            assert isinstance(answer, messages.Refused | messages.Welcome | messages.Pages)


@settings(max_examples=100)
@given(frames=st.lists(st.binary(max_size=200) | anything.map(msgpack.packb), min_size=1, max_size=10))
def test_random_messages_are_refused(running: Seed, frames: list[bytes]) -> None:
    survives(running, frames)


@settings(max_examples=100)
@given(kind=kinds, bodies=st.lists(anything, min_size=1, max_size=10), number=st.integers(-(1 << 63), (1 << 64) - 1))
def test_messages_of_every_kind_with_random_bodies_are_refused(
    running: Seed, kind: str, bodies: list[Any], number: int
) -> None:
    survives(running, [msgpack.packb([messages.MAGIC, messages.VERSION, number, kind, body]) for body in bodies])


@settings(max_examples=300)
@given(frames=st.lists(spoiled(), min_size=1, max_size=10))
def test_requests_with_one_thing_changed_are_refused(running: Seed, frames: list[bytes]) -> None:
    survives(running, frames)


def test_after_all_those_messages_a_fork_is_served(seed: Seed) -> None:
    seed.serves()


BOMBS = {
    "nested arrays": b"\x91" * 1_000_000,
    "nested maps": b"\x81\xa1a" * 300_000,
    "nested in a body": msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Hello"])[:1].replace(b"\x94", b"\x95")
    + msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Hello"])[1:]
    + b"\x91" * 1_000_000,
    "an array said to be huge": b"\xdd\xff\xff\xff\xff" + bytes(100),
    "a map said to be huge": b"\xdf\xff\xff\xff\xff" + bytes(100),
    "a text said to be huge": b"\xdb\xff\xff\xff\xff" + bytes(100),
    "bytes said to be huge": b"\xc6\xff\xff\xff\xff" + bytes(100),
    "an extension said to be huge": b"\xc9\xff\xff\xff\xff\x01" + bytes(100),
    "an extension": b"\xd4\x01\x00",
    "a moment in time": b"\xd7\xff" + bytes(8),
    "a reserved byte": b"\xc1",
    "texts that are no UTF-8": msgpack.packb([b"\xff\xfe", 1]).replace(b"\xc4\x02", b"\xa2"),
    "very many empty lists": b"\xdd" + struct.pack(">I", 1_000_000) + b"\x90" * 1_000_000,
    "very many keys": b"\xdf"
    + struct.pack(">I", 100_000)
    + b"".join(b"\xa6" + b"%06d" % i + b"\xc0" for i in range(100_000)),
    "keys that are lists": b"\x81\x90\xc0",
    "keys that are numbers": b"\x81\x01\xc0",
    "a number of no bound": msgpack.packb([messages.MAGIC, messages.VERSION, (1 << 64) - 1, "Hello", {"library": "0"}]),
    "a long name": messages.encode(messages.Hello("x" * 4096), 1).replace(b"x" * 4096, b"x" * 4096),
    "a version of any kind": msgpack.packb([messages.MAGIC, {"a": [1] * 100_000}, "x", "Hello", {}]),
    "a very long kind": msgpack.packb([messages.MAGIC, messages.VERSION, 1, "K" * 1_000_000, {}]),
    "a field that is very long": msgpack.packb(
        [messages.MAGIC, messages.VERSION, 1, "Hello", {"library": "x" * 1_000_000}]
    ),
    "not a number of seconds": msgpack.packb(
        [
            messages.MAGIC,
            messages.VERSION,
            1,
            "TakeLease",
            {"transport": "zeromq", "facts": {}, "seconds": float("nan"), "digests": False},
        ]
    ),
    "for ever": msgpack.packb(
        [
            messages.MAGIC,
            messages.VERSION,
            1,
            "TakeLease",
            {"transport": "zeromq", "facts": {}, "seconds": float("inf"), "digests": False},
        ]
    ),
}


assert all(len(bomb) <= messages.MAX_MESSAGE for bomb in BOMBS.values())  # libzmq closes the connection at longer ones


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_message_made_to_burst_is_refused(seed: Seed, bomb: str) -> None:
    survives(seed, [BOMBS[bomb]])


def test_a_request_that_cannot_be_read_is_refused_under_its_number(seed: Seed) -> None:
    """So that the sender need not wait for its deadline."""
    for body in ({"library": 1}, {"library": "0", "more": 1}, []):
        with dealer(seed) as made:
            made.send(msgpack.packb([messages.MAGIC, messages.VERSION, 19, "Hello", body]))
            assert made.poll(SECONDS * 1000)
            number, answer = messages.decode(made.recv(), messages.REPLIES)
            assert (number, answer.code) == (19, messages.MALFORMED)


def test_a_request_that_is_too_long_is_refused_before_it_is_looked_at(seed: Seed) -> None:
    """Unpacking a message that was made for it holds the interpreter for a second."""
    longest = msgpack.packb([0] * (messages.MAX_REQUEST - 3))
    for message, reason in ((longest, "not a tensorfork message"), (longest + b"x", "it may have")):
        with dealer(seed) as made:
            made.send(message)
            (refused,) = answers(made)
            assert reason in refused.reason


# Peers that do nothing, or go away.


def test_peers_that_connect_and_send_nothing_hold_up_nobody(seed: Seed) -> None:
    idle = [socket.create_connection(seed.at, timeout=SECONDS) for _ in range(200)]
    try:
        seed.serves()
    finally:
        for connection in idle:
            connection.close()


def test_a_peer_that_sends_nothing_is_disconnected(seed: Seed) -> None:
    with raw(seed) as connection:
        assert hung_up(connection)


def large_model() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.zeros(1) for i in range(5000)}


def test_a_peer_that_asks_and_never_reads_costs_little() -> None:
    with Child(serve, large_model) as child:
        seed = Seed(child)
        tensorfork.fork(seed.address, timeout=SECONDS)
        before = seed.memory()
        with zmtp(seed) as connection:
            connection.settimeout(1.0)
            send(connection, frame(messages.encode(messages.GetLayout(), 1)) * 5000)
            assert len(tensorfork.fork(seed.address, timeout=SECONDS)) == 5000
            assert seed.memory() - before < MUCH


def test_idle_connections_use_up_the_descriptors_of_a_seed_and_it_lives() -> None:
    limit = 128
    with Child(serve, model, {resource.RLIMIT_NOFILE: limit}) as child:
        seed = Seed(child)
        process = psutil.Process(child.pid)
        refusals: list[str] = []
        for wanted in range(limit - 60, limit, 5):  # libzmq would end the process at one count or other of these
            idle = []
            while process.num_fds() < wanted:
                idle.append(socket.create_connection(seed.at, timeout=SECONDS))
                send(idle[-1], GREETING + READY)
                idle[-1].recv(1)  # it is there
            try:
                tensorfork.fork(seed.address, timeout=SECONDS)
            except tensorfork.TransportUnavailable as error:
                refusals.append(str(error))
            finally:
                for connection in idle:
                    connection.close()
            while process.num_fds() > limit - 70:
                time.sleep(0.01)
        assert refusals
        assert all("file descriptors" in refusal for refusal in refusals)
        seed.serves()


def lease_of(conversation: Conversation, deadline: float) -> bytes:
    request = messages.TakeLease("zeromq", {}, SECONDS, True)
    return conversation.request(request, messages.Leased, deadline, "lease")[0].lease


def until_welcome(conversation: Conversation, deadline: float) -> None:
    conversation.request(messages.Hello("test"), messages.Welcome, deadline, "hello")


def until_layout(conversation: Conversation, deadline: float) -> None:
    until_welcome(conversation, deadline)
    conversation.request(messages.GetLayout(), messages.Pages, deadline, "layout")


def until_lease(conversation: Conversation, deadline: float) -> None:
    lease_of(conversation, deadline)


def until_message_sent(conversation: Conversation, deadline: float) -> None:
    conversation.send(lease_of(conversation, deadline), b"something", deadline)


def until_digests(conversation: Conversation, deadline: float) -> None:
    conversation.request(messages.GetDigests(lease_of(conversation, deadline)), messages.Digests, deadline, "digests")


def until_checked(conversation: Conversation, deadline: float) -> None:
    lease = lease_of(conversation, deadline)
    conversation.request(messages.CheckLease(lease, False), messages.Checked, deadline, "check")


def until_released(conversation: Conversation, deadline: float) -> None:
    lease = lease_of(conversation, deadline)
    conversation.request(messages.CheckLease(lease, True), messages.Checked, deadline, "release")


def in_the_middle_of_an_answer(conversation: Conversation, deadline: float) -> None:
    until_welcome(conversation, deadline)
    for _ in range(50):
        conversation._send_frames([messages.encode(messages.GetLayout(), 1)], deadline, "layout")


@pytest.mark.parametrize(
    "step",
    [
        until_welcome,
        until_layout,
        until_lease,
        until_message_sent,
        until_digests,
        until_checked,
        until_released,
        in_the_middle_of_an_answer,
    ],
    ids=lambda step: step.__name__,
)
def test_a_fork_may_go_away_at_any_step(seed: Seed, step: Callable[[Conversation, float], None]) -> None:
    deadline = time.monotonic() + SECONDS
    for _ in range(3):
        conversation = Conversation(seed.address, deadline)
        try:
            step(conversation, deadline)
        finally:
            conversation.close()


def test_a_fork_that_sends_more_messages_than_are_read_loses_its_lease_and_nothing_else(seed: Seed) -> None:
    deadline = time.monotonic() + SECONDS
    conversation = Conversation(seed.address, deadline)
    try:
        lease = lease_of(conversation, deadline)
        for _ in range(200):
            conversation.send(lease, b"x" * 1000, deadline)
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            conversation.request(messages.CheckLease(lease, False), messages.Checked, deadline, "check")
    finally:
        conversation.close()


# A seed that lies: a real one, and a proxy between it and the fork that changes its replies.


class Liar:
    """A proxy: forwards requests as they are, and each reply as `lie` returns it, as many times as `times` says."""

    def __init__(
        self,
        address: str,
        lie: Callable[[list[bytes]], list[bytes] | None],
        times: Callable[[list[bytes]], int] = lambda frames: 1,
    ) -> None:
        self._times = times
        self._context: zmq.Context[Any] = zmq.Context()
        self._front, self._back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self._lie, self._ended = lie, threading.Event()
        self.address = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._back.connect(address)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> str:
        self._thread.start()
        return self.address

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        poller, peer = zmq.Poller(), b""
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._ended.is_set():
            ready = dict(poller.poll(20))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                self._back.send_multipart(frames)
            if self._back in ready:
                frames = self._lie(self._back.recv_multipart())
                if frames is not None:
                    for _ in range(self._times(frames)):
                        self._front.send_multipart([peer, *frames])


def kind_of(frames: list[bytes]) -> str:
    return str(msgpack.unpackb(frames[0])[3])


def fork_through(seed: Seed, lie: Callable[[list[bytes]], list[bytes] | None], seconds: float = 1.0) -> bool:
    """Fork through a liar: it copies what the seed has (True), or ends in time with an error of ours (False)."""
    started = time.monotonic()
    found = {name: torch.zeros_like(tensor) for name, tensor in model().items()}
    with Liar(seed.address, lie) as address:
        try:
            tensorfork.fork_into(found, address, timeout=seconds)
        except tensorfork.TensorForkError:
            return False
        finally:
            assert time.monotonic() - started < 5 * (seconds + 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in model().items())
    return True


def test_a_liar_that_changes_nothing_is_no_liar(seed: Seed) -> None:
    assert fork_through(seed, lambda frames: frames, SECONDS)


changes = st.tuples(st.integers(0, 99), st.integers(0, 1 << 20), st.integers(0, 255))


@settings(max_examples=60)
@given(which=st.integers(1, 6), changed=st.lists(changes, min_size=1, max_size=8))
def test_replies_with_bytes_changed_make_a_fork_that_is_right_or_an_error(
    running: Seed, which: int, changed: list[tuple[int, int, int]]
) -> None:
    replies = itertools.count(1)

    def lie(frames: list[bytes]) -> list[bytes]:
        if next(replies) == which:
            for i, at, value in changed:
                spoilt = bytearray(frames[i % len(frames)])
                spoilt[at % len(spoilt)] = value
                frames[i % len(frames)] = bytes(spoilt)
        return frames

    fork_through(running, lie, 0.5)


def replaced(kind: str, change: Callable[[list[bytes]], list[bytes] | None]) -> Callable[[list[bytes]], Any]:
    return lambda frames: change(frames) if kind_of(frames) == kind else frames


def body(**fields: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with some of its fields changed."""

    def change(frames: list[bytes]) -> list[bytes]:
        envelope = msgpack.unpackb(frames[0])
        envelope[4].update(fields)
        return [msgpack.packb(envelope), *frames[1:]]

    return change


def page(index: int, column: int, row: int, value: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with one value of one of its tables changed."""

    def change(frames: list[bytes]) -> list[bytes]:
        table = msgpack.unpackb(frames[index])
        table[column][row] = value
        return [*frames[:index], msgpack.packb(table), *frames[index + 1 :]]

    return change


HUGE = (1 << 64) - 1
LIES = {
    "of how many tensors there are": replaced("Welcome", body(tensors=3)),
    "of how many bytes there are": replaced("Welcome", body(nbytes=3)),
    "of its digests": replaced("Welcome", body(digest="another/1")),
    "of having no transport": replaced("Welcome", body(transports={})),
    "of how many pages there are": replaced("Pages", body(tensors=1)),
    "by leaving pages out": replaced("Pages", lambda frames: frames[:2]),
    "by sending pages twice": replaced("Pages", lambda frames: [*frames, *frames[1:]]),
    "of a name": replaced("Pages", page(1, 0, 5, "another")),
    "of a name that is there already": replaced("Pages", page(1, 0, 5, "layer.0.weight")),
    "of a dtype": replaced("Pages", page(1, 1, 5, "float16")),
    "of a dtype that does not exist": replaced("Pages", page(1, 1, 5, "float17")),
    "of a shape": replaced("Pages", page(1, 2, 5, [99])),
    "of a shape of huge size": replaced("Pages", page(1, 2, 5, [HUGE])),
    "of a shape with many sizes": replaced("Pages", page(1, 2, 5, [1] * 1000)),
    "of a shape that is negative": replaced("Pages", page(1, 2, 5, [-1])),
    "of a shape that is no list": replaced("Pages", page(1, 2, 5, 100)),
    "of a stride": replaced("Pages", page(1, 3, 5, [HUGE])),
    "of an offset": replaced("Pages", page(1, 5, 5, 4)),
    "of a storage": replaced("Pages", page(1, 4, 5, 70_000)),
    "of a storage's size": replaced("Pages", page(3, 0, 5, 1 << 50)),
    "of a storage's device": replaced("Pages", page(3, 1, 5, "nowhere:7")),
    "of its generation": replaced("Leased", body(generation=8)),
    "of an odd generation": replaced("Leased", body(generation=1)),
    "of a huge generation": replaced("Leased", body(generation=HUGE)),
    "of the lease": replaced("Leased", body(lease=b"another")),
    "of the offer": replaced("Leased", body(offer=b"come here")),
    "of the token": replaced("Leased", lambda frames: body(offer=bytes(16) + _offer(frames)[16:])(frames)),
    "of the port": replaced("Leased", lambda frames: body(offer=_offer(frames)[:16] + struct.pack("<I", 1))(frames)),
    "of an impossible port": replaced(
        "Leased", lambda frames: body(offer=_offer(frames)[:16] + struct.pack("<I", HUGE >> 32))(frames)
    ),
    "by leasing nothing": replaced("Leased", lambda frames: frames[:1]),
    "by leasing half": replaced("Leased", lambda frames: frames[:-1]),
    "of a place": replaced("Leased", lambda frames: page(len(frames) - 1, 2, 5, 64)(frames)),
    "of a place beyond its region": replaced("Leased", lambda frames: page(len(frames) - 1, 2, 5, 1 << 40)(frames)),
    "of a place beyond all numbers": replaced("Leased", lambda frames: page(len(frames) - 1, 2, 5, HUGE)(frames)),
    "of a region that is not there": replaced("Leased", lambda frames: page(len(frames) - 1, 1, 5, 1 << 40)(frames)),
    "of a region's size": replaced("Leased", page(2, 1, 5, 3)),
    "of another storage's place": replaced("Leased", lambda frames: page(len(frames) - 1, 0, 5, 6)(frames)),
    "of its digests' number": replaced("Digests", lambda frames: [*frames[:-1], frames[-1][:-8]]),
    "of a digest": replaced("Digests", lambda frames: [*frames[:-1], bytes(8) + frames[-1][8:]]),
    "of the digests' generation": replaced("Digests", body(generation=2)),
    "of the generation afterwards": replaced("Checked", body(generation=2)),
    "by answering with another reply": replaced("Checked", body(more=1)),
}
RIGHT_ANYWAY = {
    "of a region's size",  # it is not needed for reading inside the region
    "of having no transport",  # it is an error, but listed so that the others are checked for being errors
}


def _offer(frames: list[bytes]) -> bytes:
    offer: bytes = msgpack.unpackb(frames[0])[4]["offer"]
    return offer


@pytest.mark.parametrize("lie", LIES)
def test_a_seed_that_lies_is_found_out(seed: Seed, lie: str) -> None:
    assert not fork_through(seed, LIES[lie]) or lie in RIGHT_ANYWAY


@pytest.mark.parametrize("kind", ["Welcome", "Pages", "Leased", "Digests", "Checked"])
def test_a_seed_that_falls_silent_costs_no_more_than_the_deadline(seed: Seed, kind: str) -> None:
    assert not fork_through(seed, replaced(kind, lambda frames: None), 0.5)


@pytest.mark.parametrize("kind", ["Welcome", "Pages", "Leased", "Digests", "Checked"])
def test_a_reply_to_an_earlier_request_is_ignored(seed: Seed, kind: str) -> None:
    """Here the second of two equal replies."""
    with Liar(seed.address, lambda frames: frames, lambda frames: 2 if kind_of(frames) == kind else 1) as address:
        found = tensorfork.fork(address, timeout=SECONDS)
    assert all(torch.equal(found[name], tensor) for name, tensor in model().items())


@pytest.mark.parametrize("offset", [1 << 40, HUGE])
def test_no_transport_is_told_to_read_beyond_what_was_leased(
    seed: Seed, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Watched(ZeroMQ):
        def open(self, *args: Any) -> Any:
            session = super().open(*args)
            monkeypatch.setattr(session, "pull", lambda *args: asked.append(args))
            return session

    lie = replaced("Leased", lambda frames: page(len(frames) - 1, 2, 5, offset)(frames))
    with (
        Liar(seed.address, lie) as address,
        pytest.raises(tensorfork.ProtocolError, match="does not lie within what was leased"),
    ):
        tensorfork.fork(address, transport=Watched(), timeout=SECONDS)
    assert asked == []
