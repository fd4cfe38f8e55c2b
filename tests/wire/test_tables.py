"""Tables: layouts, regions, places and digests arrive as they were, and anything else is refused."""

from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from attrs import asdict, evolve
from hypothesis import given
from hypothesis import strategies as st

from tensorfork import (
    Identity,
    ModelLayout,
    Place,
    ProtocolError,
    Rank,
    RemoteRegion,
    StorageLayout,
    TensorLayout,
)
from tensorfork.placement import Placement
from tensorfork.wire import messages, tables
from tensorfork.wire.tables import PAGE

TEXT = st.text(max_size=40)


# Layouts.

WELCOME = messages.Welcome(
    "0.1",
    b"id",
    3,
    2,
    1000,
    "sums3/2",
    {"zeromq": messages.Offered({"a": [1]}, None)},
    0,
    messages.WeightsVersion("l", 0),
)


def sent(layout: ModelLayout) -> ModelLayout:
    pages, frames = tables.pack_layout(layout)
    assert len(frames) == pages.tensors + pages.storages + pages.left_out
    return tables.unpack_layout(pages, frames, WELCOME)


def same(one: ModelLayout, other: ModelLayout) -> bool:
    """Whether they are equal in everything, also in storages and offsets, which `TensorLayout`'s equality ignores."""
    return asdict(one) == asdict(other)


@st.composite
def layouts(draw: st.DrawFn) -> ModelLayout:
    tensors = []
    storages = [
        StorageLayout(draw(st.integers(10_000, 2**60)), draw(st.sampled_from(["cpu", "cuda:0", "cuda:15"])))
        for _ in range(draw(st.integers(1, 4)))
    ]
    for i in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        stride = tuple(draw(st.integers(0, 30)) for _ in shape)
        placement = draw(st.none() | st.builds(Placement, st.just((8, 8)), TEXT))
        dtype, storage = (
            draw(st.sampled_from(["float32", "bool", "float8_e4m3fn"])),
            draw(st.integers(0, len(storages) - 1)),
        )
        name = f"{draw(TEXT)}.{i}"
        tensors.append(TensorLayout(name, dtype, shape, stride, storage, draw(st.integers(0, 9)) * 16, placement))
    return ModelLayout(tuple(tensors), tuple(storages), tuple(draw(st.lists(TEXT, max_size=3))))


@given(layout=layouts())
def test_a_layout_arrives_as_it_was(layout: ModelLayout) -> None:
    assert same(sent(layout), layout)


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 20_000])
def test_a_layout_of_any_length_arrives_as_it_was_in_pages_of_bounded_length(count: int) -> None:
    layout = long(count)
    pages, frames = tables.pack_layout(layout)
    assert pages.tensors == pages.storages == -(-count // PAGE)
    assert all(len(msgpack.unpackb(frame)[0]) <= PAGE for frame in frames)
    assert same(sent(layout), layout)


def long(count: int) -> ModelLayout:
    tensors = [TensorLayout(f"model.layers.{i}.weight", "bfloat16", (64, 4), (4, 1), i, 0) for i in range(count)]
    return ModelLayout(tuple(tensors), tuple(StorageLayout(512, "cpu") for _ in range(count)))


ROW = ["w", "float32", [2, 3], [3, 1], 0, 0, None]


def columns(*rows: Sequence[Any]) -> bytes:
    packed: bytes = msgpack.packb([list(column) for column in zip(*rows, strict=True)])
    return packed


def unpacked(tensors: bytes, storages: bytes | None = None, left_out: bytes | None = None) -> ModelLayout:
    storages = columns([1000, "cpu"]) if storages is None else storages
    frames = [tensors, storages] + ([] if left_out is None else [left_out])
    return tables.unpack_layout(messages.Pages(1, 1, len(frames) - 2), frames, WELCOME)


def test_the_table_that_the_tests_below_change_is_valid_unchanged() -> None:
    assert unpacked(columns(ROW)).tensors == (TensorLayout("w", "float32", (2, 3), (3, 1), 0, 0),)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (0, 7), (0, b"w"), (0, None), (0, "x" * 4097),
        (1, 7), (1, "float3"), (1, b"float32"), (1, None),
        (2, [2, -3]), (2, [2.0, 3]), (2, ["2", 3]), (2, 6), (2, None), (2, "23"), (2, b"\2\3"), (2, {"2": 3}), (2, [2]),
        (2, [True, 3]), (2, [0] * 65),
        (3, [3]), (3, [3, 1, 1]), (3, [3, -1]), (3, b"\3\1"), (3, [1000, 1]), (3, [2**62, 1]),
        (4, 1), (4, -1), (4, 0.0), (4, None), (4, "0"), (4, False),
        (5, -4), (5, 2), (5, 1000), (5, 2**63), (5, None), (5, 0.0), (5, True),
        (6, 7), (6, []), (6, [[2, 3]]), (6, [[2, -3], "Shard(0)"]), (6, [[2, 3], 7]), (6, {"a": 1}), (6, "ab"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_tensor_that_cannot_be_is_refused(column: int, value: Any) -> None:
    row = list(ROW)
    row[column] = value
    with pytest.raises(ProtocolError, match="layout"):
        unpacked(columns(row))


@pytest.mark.parametrize(
    "storage", [[-1, "cpu"], [1000.0, "cpu"], ["1000", "cpu"], [1000, "tpu:0"], [1000, "meta"], [1000, None], [100, 5]],
    ids=repr,
)  # fmt: skip
def test_a_storage_that_cannot_be_is_refused(storage: list[Any]) -> None:
    with pytest.raises(ProtocolError, match="a malformed layout came"):
        unpacked(columns(ROW), columns(storage))


@pytest.mark.parametrize(
    "page",
    [b"", b"\xc1", b"\x00", b"\x90", msgpack.packb({"a": 1}), msgpack.packb([[1]] * 6), msgpack.packb([7] * 7),
     msgpack.packb([["w"], ["float32"], [[2, 3]], [[3, 1]], [0], [0], []]), columns(ROW, ROW), columns([*ROW, 1]),
     msgpack.packb(["w", "f", "s", "t", "o", "f", "p"])],
)  # fmt: skip
def test_a_page_that_is_not_a_table_of_that_many_columns_is_refused(page: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpacked(page)


def test_another_number_of_pages_than_announced_is_refused() -> None:
    with pytest.raises(ProtocolError, match="it has 2 pages, and others were announced"):
        tables.unpack_layout(messages.Pages(1, 2, 0), [columns(ROW), columns([1000, "cpu"])], WELCOME)


def test_more_rows_than_a_model_can_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TENSORS", 1)
    with pytest.raises(ProtocolError, match="more than 1 rows"):
        unpacked(columns(ROW, ["v", *ROW[1:]]))


@pytest.mark.parametrize("name", [7, None, b"w", "x" * 4097, ["w"]], ids=lambda name: repr(name)[:20])
def test_a_name_left_out_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ProtocolError, match="a malformed layout came"):
        unpacked(columns(ROW), left_out=msgpack.packb([[name]]))


# Identity and rank.


def with_identity(identity: dict[str, Any] | None, rank: dict[str, Any] | None) -> messages.Welcome:
    return evolve(WELCOME, identity=identity, rank=rank)


@pytest.mark.parametrize("identity", [None, Identity(), Identity(model="m", kernels={"a": "b"}, role="")], ids=repr)
@pytest.mark.parametrize("rank", [None, Rank(), Rank(tp=(0, 2), dp=(1, 2))], ids=repr)
def test_an_identity_and_a_rank_arrive_as_they_were(identity: Identity | None, rank: Rank | None) -> None:
    packed = with_identity(tables.pack_identity(identity), tables.pack_rank(rank))
    _, arrived = messages.decode(messages.encode(packed, 1), (messages.Welcome,))
    assert tables.unpack_identity(arrived) == (identity, rank)


def test_only_what_was_given_travels_so_that_what_comes_of_the_future_was_given() -> None:
    assert tables.pack_identity(Identity(model="m")) == {"model": "m"}
    assert tables.pack_rank(Rank(pp=(0, 2))) == {"pp": (0, 2)}


def test_a_field_that_is_not_known_is_refused_since_it_would_not_be_compared() -> None:
    with pytest.raises(ProtocolError, match=r"the seed gives 'sparsity' in its identity, which .* does not compare"):
        tables.unpack_identity(with_identity({"model": "m", "sparsity": "2:4"}, None))
    with pytest.raises(ProtocolError, match="the seed gives 'dcp' in its rank"):
        tables.unpack_identity(with_identity(None, {"dcp": [0, 2]}))


# Places and digests.


@given(data=st.data())
def test_regions_and_places_arrive_as_they_were(data: st.DataObject) -> None:
    natural = st.integers(0, 2**63)
    regions = data.draw(st.lists(st.builds(RemoteRegion, natural, natural, TEXT), max_size=5))
    places = data.draw(st.dictionaries(natural, st.builds(Place, natural, natural), max_size=5))
    pages = tables.pack_places(regions, places)
    assert (tables.unpack_regions(pages), tables.unpack_places(pages)) == (regions, places)


@pytest.mark.parametrize("count", [0, PAGE, PAGE + 1, 20_000])
def test_regions_and_places_of_any_number_arrive_as_they_were(count: int) -> None:
    regions = [RemoteRegion(i, 512, "cpu") for i in range(count)]
    places = {i: Place(i, 8) for i in range(count)}
    pages = tables.pack_places(regions, places)
    assert (tables.unpack_regions(pages), tables.unpack_places(pages)) == (regions, places)


@pytest.mark.parametrize(
    "pages",
    [
        [],
        [b""],
        [msgpack.packb(-1)],
        [msgpack.packb("1")],
        [msgpack.packb(True)],
        [msgpack.packb(1), columns([0, 512])],
        [msgpack.packb(1), columns([0, -1, "cpu"])],
        [msgpack.packb(1), columns([0, 512, 7])],
        [msgpack.packb(1), columns([0.0, 512, "cpu"])],
        [msgpack.packb(0), columns([0, 0, -1])],
        [msgpack.packb(0), columns([0, None, 0])],
        [msgpack.packb(0), columns(["0", 0, 0])],
        [msgpack.packb(0), columns([[0], 0, 0])],
    ],
)
def test_a_table_of_regions_that_cannot_be_is_refused(pages: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        (tables.unpack_regions(pages), tables.unpack_places(pages))


@given(values=st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_digests_arrive_as_they_were(values: list[int]) -> None:
    assert tables.unpack_digests(tables.pack_digests(values), len(values)) == values


def test_many_digests_arrive_as_they_were_in_frames_of_bounded_length() -> None:
    frames = tables.pack_digests(range(20_000))
    assert max(map(len, frames)) == 8 * PAGE
    assert tables.unpack_digests(frames, 20_000) == list(range(20_000))


@pytest.mark.parametrize("frames", [[], [bytes(8)], [bytes(24)], [bytes(15)], [bytes(16), b"x"]], ids=repr)
def test_another_number_of_digests_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="bytes of digests came for 2 tensors"):
        tables.unpack_digests(frames, 2)


def test_layouts_differ_where_places_do() -> None:
    """The reason for `same`."""
    layout = long(2)
    moved = evolve(layout, tensors=(evolve(layout.tensors[0], storage=1), layout.tensors[1]))
    assert layout == moved
    assert not same(layout, moved)
