"""Messages: whatever is encoded is decoded as it was, and anything else is refused."""

import re
from typing import Any

import msgpack
import pytest
from attrs import NOTHING, asdict, fields
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfork import ProtocolError
from tensorfork.wire import messages
from tensorfork.wire.messages import MAX_FRAMES, MAX_TENSORS, OtherVersion

BOTH = (*messages.REQUESTS, *messages.REPLIES)
COUNTS = st.integers(0, MAX_FRAMES)
TEXT = st.text(max_size=40)
TOKENS = st.binary(max_size=64)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary()
FACTS = st.dictionaries(TEXT, st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
OFFERED = st.builds(messages.Offered, FACTS, st.none() | TEXT)
NUMBERS = st.integers(0, 2**63)
RATES = st.floats(1e-3, 1e15)
VERSIONS = st.builds(messages.WeightsVersion, TEXT, NUMBERS, st.none() | TEXT, st.none() | TEXT)

REFUSALS = st.builds(messages.Refused, st.sampled_from(messages.CODES), TEXT, st.lists(TEXT, max_size=3))

MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    messages.Ended: st.builds(messages.Ended, TOKENS, REFUSALS),
    messages.Hello: st.builds(messages.Hello, TEXT),
    messages.Welcome: st.builds(
        messages.Welcome,
        TEXT,
        TOKENS,
        st.integers(0, MAX_TENSORS),
        st.integers(0, MAX_TENSORS),
        st.integers(0, 2**64 - 1),
        TEXT,
        st.dictionaries(TEXT, OFFERED, max_size=3),
        NUMBERS,
        VERSIONS,
        st.none() | FACTS,
        st.none() | FACTS,
    ),
    messages.GetLayout: st.builds(messages.GetLayout, st.none() | NUMBERS),
    messages.Pages: st.builds(messages.Pages, COUNTS, COUNTS, COUNTS),
    messages.TakeLease: st.builds(
        messages.TakeLease, TEXT, FACTS, st.floats(0, 86400), st.booleans(), st.none() | NUMBERS
    ),
    messages.Leased: st.builds(
        messages.Leased,
        TOKENS,
        st.integers(0, 2**63),
        COUNTS,
        COUNTS,
        VERSIONS,
        rate_limit=st.none() | RATES,
        share=st.none() | RATES,
    ),
    messages.ChangeShare: st.builds(messages.ChangeShare, TOKENS, RATES),
    messages.Say: st.builds(messages.Say, TOKENS),
    messages.GetDigests: st.builds(messages.GetDigests, TOKENS),
    messages.Digests: st.builds(messages.Digests, st.integers(0, 2**63), COUNTS),
    messages.GetPieces: st.builds(
        messages.GetPieces, TOKENS, st.sets(NUMBERS, max_size=messages.MAX_PIECES_OF).map(sorted)
    ),
    messages.Pieces: st.builds(messages.Pieces, NUMBERS),
    messages.CheckLease: st.builds(messages.CheckLease, TOKENS, st.booleans()),
    messages.Checked: st.builds(messages.Checked, st.integers(0, 2**63)),
    messages.Refused: REFUSALS,
}
VERSION = messages.WeightsVersion("0123", 3, "step-3", "4567")
SAMPLES: dict[type[Any], Any] = {
    messages.Ended: messages.Ended(b"lease", messages.Refused("changed", "other tensors", ["a"])),
    messages.Hello: messages.Hello("0.1"),
    messages.Welcome: messages.Welcome(
        "0.1", b"id", 3, 2, 1000, "sums4/1", {"zeromq": messages.Offered({"a": [1]}, None)}, 7, VERSION
    ),
    messages.GetLayout: messages.GetLayout(7),
    messages.Pages: messages.Pages(1, 1, 0),
    messages.TakeLease: messages.TakeLease("zeromq", {"devices": ["cpu"]}, 60.0, True, 7),
    messages.Leased: messages.Leased(b"lease", 4, 2, 1, VERSION),
    messages.ChangeShare: messages.ChangeShare(b"lease", 1e9),
    messages.Say: messages.Say(b"lease"),
    messages.GetDigests: messages.GetDigests(b"lease"),
    messages.Digests: messages.Digests(4, 1),
    messages.GetPieces: messages.GetPieces(b"lease", [0, 7]),
    messages.Pieces: messages.Pieces(4),
    messages.CheckLease: messages.CheckLease(b"lease", False),
    messages.Checked: messages.Checked(4),
    messages.Refused: messages.Refused("moved", "two tensors moved", ["a", "b"]),
}


def body_of(message: Any) -> dict[str, Any]:
    return asdict(message)


def frame(kind: str, body: Any, number: Any = 7, version: Any = messages.VERSION, magic: Any = messages.MAGIC) -> bytes:
    packed: bytes = msgpack.packb([magic, version, number, kind, body])
    return packed


def refused(raw: bytes, expected: tuple[type[Any], ...] = BOTH) -> str:
    with pytest.raises(ProtocolError) as raised:
        messages.decode(raw, expected)
    return str(raised.value)


# A message arrives as it was.


def test_every_message_has_its_sample() -> None:
    assert set(SAMPLES) == set(MESSAGES) == set(BOTH)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_a_message_arrives_as_it_was(kind: type[Any], data: st.DataObject) -> None:
    message, number = data.draw(MESSAGES[kind]), data.draw(st.integers(0, 2**63))
    assert messages.decode(messages.encode(message, number), (kind,)) == (number, message)


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_a_message_is_read_only_where_its_kind_is_expected(kind: type[Any]) -> None:
    others = tuple(other for other in BOTH if other is not kind)
    assert f"a '{kind.__name__}' came where none is expected" in refused(messages.encode(SAMPLES[kind], 1), others)


def test_a_seed_reads_only_requests() -> None:
    assert set(messages.REQUESTS) & set(messages.REPLIES) == {messages.Say}
    for kind, message in SAMPLES.items():
        if kind not in messages.REQUESTS:
            refused(messages.encode(message, 1), messages.REQUESTS)


# Anything else is refused.

ODD = [None, True, 7, -1, 1.5, "text", b"bytes", [], [1], {}, {"a": 1}, 2**63]


def fits(annotation: Any, value: Any) -> bool:
    """Whether the value has the field's type; bounds are not considered."""
    plain = {"str": str, "bytes": bytes, "int": int, "float": float, "bool": bool}
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if name in plain:
        return type(value) is plain[name]
    if value is None:
        return "None" in str(annotation)
    if any(kind in str(annotation) for kind in ("int", "float", "list")):
        return type(value) in (int, float, list) and type(value).__name__ in str(annotation)
    return type(value) is dict


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_a_field_of_another_type_is_refused(kind: type[Any]) -> None:
    for one in fields(kind):
        for value in ODD:
            if not fits(one.type, value):
                said = refused(frame(kind.__name__, {**body_of(SAMPLES[kind]), one.name: value}))
                assert f"a malformed {kind.__name__} came" in said, (one.name, value)


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_a_field_too_few_is_refused_and_one_too_many_is_skipped(kind: type[Any]) -> None:
    body = body_of(SAMPLES[kind])
    assert messages.decode(frame(kind.__name__, {**body, "of the future": {"a": [1]}}), (kind,))[1] == SAMPLES[kind]
    for one in fields(kind):
        if one.default is NOTHING:
            assert "malformed" in refused(frame(kind.__name__, {k: v for k, v in body.items() if k != one.name}))


@pytest.mark.parametrize("body", [None, [], [1, 2], "Hello", 7, b"", {"library": {}}, {b"library": "0.1"}], ids=repr)
def test_a_body_that_is_not_the_message_s_fields_is_refused(body: Any) -> None:
    refused(frame("Hello", body))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (messages.Hello, "library", "x" * 4097),
        (messages.Welcome, "tensors", MAX_TENSORS + 1),
        (messages.Welcome, "tensors", -1),
        (messages.Welcome, "storages", MAX_TENSORS + 1),
        (messages.Welcome, "nbytes", -1),
        (messages.Welcome, "seed", bytes(65)),
        (messages.Pages, "tensors", MAX_FRAMES + 1),
        (messages.Pages, "storages", -1),
        (messages.Pages, "left_out", MAX_FRAMES + 1),
        (messages.TakeLease, "seconds", -0.1),
        (messages.TakeLease, "seconds", 86401.0),
        (messages.TakeLease, "seconds", float("nan")),
        (messages.TakeLease, "seconds", float("inf")),
        (messages.TakeLease, "transport", "x" * 4097),
        (messages.Leased, "lease", bytes(65)),
        (messages.Leased, "regions", MAX_FRAMES + 1),
        (messages.Leased, "places", -1),
        *((messages.Leased, "rate_limit", rate) for rate in (0.0, -1.0, float("inf"), float("nan"))),
        *((messages.Leased, "share", rate) for rate in (0.0, -1.0, float("inf"), float("nan"))),
        *((messages.ChangeShare, "share", rate) for rate in (0.0, -1.0, float("inf"), float("nan"))),
        (messages.ChangeShare, "lease", bytes(65)),
        (messages.Say, "lease", bytes(65)),
        (messages.GetDigests, "lease", bytes(65)),
        (messages.Digests, "frames", MAX_FRAMES + 1),
        (messages.GetPieces, "lease", bytes(65)),
        (messages.GetPieces, "tensors", list(range(messages.MAX_PIECES_OF + 1))),
        (messages.GetPieces, "tensors", [1, 0]),
        (messages.GetPieces, "tensors", [0, 0]),
        (messages.GetPieces, "tensors", [-1]),
        (messages.GetPieces, "tensors", ["a"]),
        (messages.CheckLease, "lease", bytes(65)),
        (messages.Refused, "code", "x" * 4097),
        (messages.Refused, "reason", "x" * 65537),
    ],
)
def test_a_value_out_of_bounds_is_refused(message: type[Any], field: str, value: Any) -> None:
    assert "malformed" in refused(frame(message.__name__, {**body_of(SAMPLES[message]), field: value}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"hello, world",
        msgpack.packb(7),
        msgpack.packb({"magic": messages.MAGIC}),
        msgpack.packb([]),
        msgpack.packb([messages.MAGIC]),
        msgpack.packb([messages.MAGIC, messages.VERSION]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Hello"]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Hello", {"library": "x"}, 6]),
        msgpack.packb([messages.MAGIC, messages.VERSION, "1", "Hello", {"library": "x"}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, True, "Hello", {"library": "x"}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, 5, {"library": "x"}]),
        msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Object", {}]),
        msgpack.packb(["another", messages.VERSION, 1, "Hello", {"library": "x"}]),
        messages.encode(messages.Hello("0.1"), 1)[:-1],
        messages.encode(messages.Hello("0.1"), 1) + b"\0",
        b"\x91" * 10_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_not_a_message_is_refused(raw: bytes) -> None:
    refused(raw)


@settings(max_examples=300)
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    refused(raw)


@settings(max_examples=300)
@given(data=st.data())
def test_a_message_with_some_bytes_changed_is_another_message_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(SAMPLES)))
    raw = bytearray(messages.encode(SAMPLES[kind], 7))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        number, message = messages.decode(bytes(raw), BOTH)
    except ProtocolError:
        return
    assert type(number) is int
    assert type(message) in SAMPLES


@pytest.mark.parametrize("version", [0, 1, 99, "2", None, [1], 2**63])
def test_another_version_is_told_apart_with_its_number_and_both_versions(version: Any) -> None:
    with pytest.raises(
        OtherVersion, match=f"speaks version {re.escape(str(version))} .* we speak {messages.VERSION}"
    ) as raised:
        messages.decode(frame("Whatever", {"of": "the future"}, number=41, version=version), BOTH)
    assert raised.value.number == 41


def test_a_request_number_that_is_not_an_int_is_taken_for_zero() -> None:
    with pytest.raises(OtherVersion) as raised:
        messages.decode(frame("Hello", {}, number="x" * 100, version=1), BOTH)
    assert raised.value.number == 0
