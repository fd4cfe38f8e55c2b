"""Whatever is sent to a seed's port, it serves the next fork. Whatever a seed sends, the fork is right or an error."""

import struct
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from hostile import GREETING, LONG, MORE, READY, SECONDS, Seed, answers, dealer, frame, hung_up, raw, send, zmtp
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfork.wire import messages

pytestmark = pytest.mark.slow

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


def test_a_message_of_very_many_frames_ends_its_connection(seed: Seed) -> None:
    hello, empty = frame(messages.encode(messages.Hello("test"), 5), MORE), bytes([MORE, 0])
    with zmtp(seed) as connection:
        send(connection, hello + empty * 20_000 + frame(b""))
        assert hung_up(connection)
    seed.serves()


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
        messages.GetPieces(some_lease, [0, 7]),
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
            assert isinstance(answer, messages.Refused | messages.Welcome | messages.Pages | messages.Ended)


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
    for kind, body in (("Hello", {"library": 1}), ("Hello", {}), ("Hello", []), ("OfTheFuture", {})):
        with dealer(seed) as made:
            made.send(msgpack.packb([messages.MAGIC, messages.VERSION, 19, kind, body]))
            assert made.poll(SECONDS * 1000)
            number, answer = messages.decode(made.recv(), messages.REPLIES)
            assert (number, answer.code) == (19, messages.MALFORMED)


def test_a_request_with_fields_of_the_future_is_answered(seed: Seed) -> None:
    with dealer(seed) as made:
        body = {"library": "9.0", "more": {"a": [1]}}
        made.send(msgpack.packb([messages.MAGIC, messages.VERSION, 19, "Hello", body]))
        assert made.poll(SECONDS * 1000)
        number, answer = messages.decode(made.recv(), messages.REPLIES)
        assert (number, type(answer)) == (19, messages.Welcome)


def test_a_request_that_is_too_long_is_refused_before_it_is_looked_at(seed: Seed) -> None:
    """Unpacking a message that was made for it holds the interpreter for a second."""
    longest = msgpack.packb([0] * (messages.MAX_REQUEST - 3))
    for message, reason in ((longest, "not a tensorfork message"), (longest + b"x", "it may have")):
        with dealer(seed) as made:
            made.send(message)
            (refused,) = answers(made)
            assert reason in refused.reason
