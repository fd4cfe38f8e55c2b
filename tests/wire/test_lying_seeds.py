"""A seed that lies: whatever a seed sends, the fork is right or an error."""

import itertools
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from hostile import (
    SECONDS,
    Seed,
    model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lying_seeds import Liar, kind_of

import tensorfork
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow


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


def as_a(kind: str, **more: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The reply as one of another kind, with these fields more."""

    def change(frames: list[bytes]) -> list[bytes]:
        envelope = msgpack.unpackb(frames[0])
        envelope[3:] = [kind, {**envelope[4], **more}]
        return [msgpack.packb(envelope), *frames[1:]]

    return change


def page(index: int, column: str, row: int, value: Any) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with one value of one of its tables changed."""

    def change(frames: list[bytes]) -> list[bytes]:
        table = msgpack.unpackb(frames[index])
        table[column][row] = value
        frames[index] = msgpack.packb(table)
        return frames

    return change


def without(index: int, column: str) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with one of its tables lacking a column."""

    def change(frames: list[bytes]) -> list[bytes]:
        table = msgpack.unpackb(frames[index])
        del table[column]
        frames[index] = msgpack.packb(table)
        return frames

    return change


def offer(change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with another offer of the transport's."""
    return lambda frames: [frames[0], change(frames[1]), *frames[2:]]


def padded(index: int, nbytes: int) -> Callable[[list[bytes]], list[bytes]]:
    """The reply with a column nobody knows in one of its tables, of so many bytes."""

    def change(frames: list[bytes]) -> list[bytes]:
        frames[index] = msgpack.packb(msgpack.unpackb(frames[index]) | {"of the future": bytes(nbytes)})
        return frames

    return change


HUGE = (1 << 64) - 1
LIES = {
    "of how many tensors there are": replaced("Welcome", body(tensors=3)),
    "of how many bytes there are": replaced("Welcome", body(nbytes=3)),
    "of its digests": replaced("Welcome", body(digest="another/1")),
    "of having no transport": replaced("Welcome", body(transports={})),
    "of how many pages there are": replaced("Pages", body(tensors=1)),
    "by leaving pages out": replaced("Pages", lambda frames: frames[:2]),
    "by leaving a column out": replaced("Pages", without(1, "stride")),
    "by leaving a column of places out": replaced("Leased", without(4, "offset")),
    "of how many tensors were left out": replaced("Welcome", body(left_out=HUGE)),
    "by sending a page that is too long": replaced("Pages", padded(1, 1 << 20)),
    "by sending a reply that is too long": replaced("Welcome", body(more=bytes(1 << 20))),
    "by sending pages twice": replaced("Pages", lambda frames: [*frames, *frames[1:]]),
    "of a name": replaced("Pages", page(1, "name", 5, "another")),
    "of a name that is there already": replaced("Pages", page(1, "name", 5, "layer.0.weight")),
    "of a dtype": replaced("Pages", page(1, "dtype", 5, "float16")),
    "of a dtype that does not exist": replaced("Pages", page(1, "dtype", 5, "float17")),
    "of a shape": replaced("Pages", page(1, "shape", 5, [99])),
    "of a shape of huge size": replaced("Pages", page(1, "shape", 5, [HUGE])),
    "of a shape with many sizes": replaced("Pages", page(1, "shape", 5, [1] * 1000)),
    "of a shape that is negative": replaced("Pages", page(1, "shape", 5, [-1])),
    "of a shape that is no list": replaced("Pages", page(1, "shape", 5, 100)),
    "of a stride": replaced("Pages", page(1, "stride", 5, [HUGE])),
    "of an offset": replaced("Pages", page(1, "offset", 5, 4)),
    "of a storage": replaced("Pages", page(1, "storage", 5, 70_000)),
    "of a storage's size": replaced("Pages", page(3, "nbytes", 5, 1 << 50)),
    "of a storage's device": replaced("Pages", page(3, "device", 5, "nowhere:7")),
    "of its generation": replaced("Leased", body(generation=8)),
    "of an odd generation": replaced("Leased", body(generation=1)),
    "of a huge generation": replaced("Leased", body(generation=HUGE)),
    "of the lease": replaced("Leased", body(lease=b"another")),
    "of the offer": replaced("Leased", offer(lambda was: b"come here")),
    "of the token": replaced("Leased", offer(lambda was: bytes(16) + was[16:])),
    "of the port": replaced("Leased", offer(lambda was: was[:16] + struct.pack("<I", 1))),
    "of an impossible port": replaced("Leased", offer(lambda was: was[:16] + struct.pack("<I", HUGE >> 32))),
    "by leasing nothing": replaced("Leased", lambda frames: frames[:1]),
    "by leasing half": replaced("Leased", lambda frames: frames[:-1]),
    "of a place": replaced("Leased", page(-1, "offset", 5, 64)),
    "of a place beyond its region": replaced("Leased", page(-1, "offset", 5, 1 << 40)),
    "of a place beyond all numbers": replaced("Leased", page(-1, "offset", 5, HUGE)),
    "of a region that is not there": replaced("Leased", page(-1, "region", 5, 1 << 40)),
    "of a region's size": replaced("Leased", page(2, "nbytes", 5, 3)),
    "of another storage's place": replaced("Leased", page(-1, "storage", 5, 6)),
    "of its digests' number": replaced("Digests", lambda frames: [*frames[:-1], frames[-1][:-8]]),
    "of a digest": replaced("Digests", lambda frames: [*frames[:-1], bytes(8) + frames[-1][8:]]),
    "of the digests' generation": replaced("Digests", body(generation=2)),
    "of the generation afterwards": replaced("Checked", body(generation=2)),
    "by answering with another reply": replaced("Checked", as_a("Digests", frames=0)),
    "of its identity": replaced("Welcome", body(identity={"of the future": "x"})),
    "of its rank": replaced("Welcome", body(rank={"of the future": [1, 2]})),
}
RIGHT_ANYWAY = {
    "of a region's size",  # it is not needed for reading inside the region
    "of having no transport",  # it is an error, but listed so that the others are checked for being errors
}


@pytest.mark.parametrize("lie", LIES)
def test_a_seed_that_lies_is_found_out(seed: Seed, lie: str) -> None:
    assert not fork_through(seed, LIES[lie]) or lie in RIGHT_ANYWAY


def test_fields_of_the_future_in_every_reply_change_nothing(seed: Seed) -> None:
    def add(frames: list[bytes]) -> list[bytes]:
        envelope = msgpack.unpackb(frames[0])
        body = envelope[4]
        for record in (body, body.get("version", {}), *body.get("transports", {}).values()):
            record["of the future"] = {"a": [1]}
        return [msgpack.packb(envelope), *frames[1:]]

    assert fork_through(seed, add, SECONDS)


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

    lie = replaced("Leased", page(-1, "offset", 5, offset))
    with (
        Liar(seed.address, lie) as address,
        pytest.raises(tensorfork.ProtocolError, match="does not lie within what was leased"),
    ):
        tensorfork.fork(address, transport=Watched(), timeout=SECONDS)
    assert asked == []
