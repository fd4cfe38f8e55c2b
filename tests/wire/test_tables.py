"""Tables: layouts, regions, places and digests arrive as they were, and anything else is refused."""

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
from tensorfork.wire.pages import PAGE

TEXT = st.text(max_size=40)


# Layouts.

WELCOME = messages.Welcome(
    "0.1",
    b"id",
    3,
    2,
    1000,
    "sums4/1",
    {"zeromq": messages.Offered({"a": [1]}, None)},
    0,
    messages.WeightsVersion("l", 0),
    left_out=1,
)


def sent(layout: ModelLayout) -> ModelLayout:
    pages, frames = tables.pack_layout(layout)
    assert len(frames) == pages.tensors + pages.storages + pages.left_out
    counts = {"tensors": len(layout.tensors), "storages": len(layout.storages), "left_out": len(layout.left_out)}
    return tables.unpack_layout(pages, frames, evolve(WELCOME, **counts))


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
    assert all(len(column) <= PAGE for frame in frames for column in msgpack.unpackb(frame).values())
    assert same(sent(layout), layout)


def long(count: int) -> ModelLayout:
    tensors = [TensorLayout(f"model.layers.{i}.weight", "bfloat16", (64, 4), (4, 1), i, 0) for i in range(count)]
    return ModelLayout(tuple(tensors), tuple(StorageLayout(512, "cpu") for _ in range(count)))


ROW: dict[str, Any] = {"name": "w", "dtype": "float32", "shape": [2, 3], "stride": [3, 1], "storage": 0, "offset": 0}
STORAGE: dict[str, Any] = {"nbytes": 1000, "device": "cpu"}


def columns(*rows: dict[str, Any]) -> bytes:
    """A page of these rows."""
    packed: bytes = msgpack.packb({name: [row[name] for row in rows] for name in rows[0]})
    return packed


def unpacked(tensors: bytes, storages: bytes | None = None, left_out: bytes | None = None) -> ModelLayout:
    storages = columns(STORAGE) if storages is None else storages
    frames = [tensors, storages] + ([] if left_out is None else [left_out])
    return tables.unpack_layout(messages.Pages(1, 1, len(frames) - 2), frames, WELCOME)


def test_the_table_that_the_tests_below_change_is_valid_unchanged() -> None:
    assert unpacked(columns(ROW)).tensors == (TensorLayout("w", "float32", (2, 3), (3, 1), 0, 0),)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("name", value) for value in (7, b"w", None, "x" * 4097)],
        *[("dtype", value) for value in (7, "float3", b"float32", None)],
        *[
            ("shape", value)
            for value in (
                [2, -3], [2.0, 3], ["2", 3], 6, None, "23", b"\2\3", {"2": 3}, [2], [True, 3], [0] * 65, [2, None]
            )
        ],
        *[("stride", value) for value in ([3], [3, 1, 1], [3, -1], b"\3\1", [1000, 1], [2**62, 1])],
        *[("storage", value) for value in (1, -1, 0.0, None, "0", False)],
        *[("offset", value) for value in (-4, 2, 1000, 2**63, None, 0.0, True)],
        *[
            ("placement", value)
            for value in (7, [], [[2, 3]], [[2, -3], "Shard(0)"], [[2, 3], 7], {"a": 1}, "ab", [None, "ab"], [6, "ab"])
        ],
    ],
    ids=repr,
)  # fmt: skip
def test_a_tensor_that_cannot_be_is_refused(column: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match="layout"):
        unpacked(columns(ROW | {column: value}))
    with pytest.raises(ProtocolError, match="layout"):  # also where the others are as they should be
        unpacked(columns({"placement": None} | ROW, {"placement": None} | ROW | {"name": "v", column: value}))


@pytest.mark.parametrize(
    "storage",
    [
        {"nbytes": -1}, {"nbytes": 1000.0}, {"nbytes": "1000"}, {"device": "tpu:0"}, {"device": "meta"},
        {"device": None}, {"nbytes": 10}, {"device": 5},
    ],
    ids=repr,
)  # fmt: skip
def test_a_storage_that_cannot_be_is_refused(storage: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="a malformed layout came"):
        unpacked(columns(ROW), columns(STORAGE | storage))


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"\xc1",
        b"\x00",
        b"\x90",
        msgpack.packb({}),
        msgpack.packb({"a": 1}),
        msgpack.packb([["w"], ["float32"], [[2, 3]], [[3, 1]], [0], [0]]),
        msgpack.packb(ROW),
        msgpack.packb({name: [value] for name, value in ROW.items()} | {"placement": []}),
        msgpack.packb({name: [value] for name, value in ROW.items()} | {"placement": {"a": 1}}),
        msgpack.packb({name: [value] for name, value in ROW.items()} | {"offset": [0, 0]}),
        columns(ROW, ROW),
    ],
)
def test_a_page_that_is_not_a_table_of_these_columns_is_refused(page: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpacked(page)


@pytest.mark.parametrize("column", ROW)
def test_a_page_without_a_column_that_is_needed_is_refused_by_name(column: str) -> None:
    with pytest.raises(ProtocolError, match=f"a malformed layout came: a page lacks the column '{column}'"):
        unpacked(columns({name: value for name, value in ROW.items() if name != column}))


def test_columns_of_the_future_are_skipped_whatever_they_hold() -> None:
    more = {"of the future": [{"a": 1}], "another": 7, "a third": [1, 2, 3]}
    page = msgpack.packb({name: [value] for name, value in ROW.items()} | more)
    storages = msgpack.packb({name: [value] for name, value in STORAGE.items()} | more)
    left_out = msgpack.packb({"name": ["x"]})
    later_left_out = msgpack.packb({"name": ["x"]} | more)
    assert same(unpacked(page, storages, later_left_out), unpacked(columns(ROW), left_out=left_out))
    regions, places = [RemoteRegion(0, 8, "cpu")], {0: Place(0, 4)}
    packed = tables.pack_regions(regions), tables.pack_places(places), tables.pack_values(["a"], [1])
    later = [[msgpack.packb(msgpack.unpackb(page) | more) for page in pages] for pages in packed]
    assert tables.unpack_regions(later[0], 1) == regions
    assert tables.unpack_places(later[1], 1) == places
    assert tables.unpack_values(later[2]) == {"a": 1}


def test_placements_travel_only_in_pages_that_have_any() -> None:
    whole = long(2 * PAGE)
    shard = evolve(whole.tensors[PAGE], placement=Placement((8, 8), "Shard(dim=0) 1/2"))
    _, frames = tables.pack_layout(evolve(whole, tensors=(*whole.tensors[:PAGE], shard, *whole.tensors[PAGE + 1 :])))
    assert ["placement" in msgpack.unpackb(frame) for frame in frames[:2]] == [False, True]


def test_another_number_of_pages_than_announced_is_refused() -> None:
    with pytest.raises(ProtocolError, match="it has 2 pages, and others were announced"):
        tables.unpack_layout(messages.Pages(1, 2, 0), [columns(ROW), columns(STORAGE)], WELCOME)


@pytest.mark.parametrize("announced", ["tensors", "storages", "left_out"])
def test_more_rows_than_the_welcome_announced_are_refused(announced: str) -> None:
    frames = [columns(ROW, ROW | {"name": "v"}), columns(STORAGE, STORAGE), msgpack.packb({"name": ["x", "y"]})]
    pages, welcome = messages.Pages(1, 1, 1), evolve(WELCOME, tensors=2, storages=2, left_out=2)
    assert len(tables.unpack_layout(pages, frames, welcome).tensors) == 2
    with pytest.raises(ProtocolError, match="it has more than 1 rows"):
        tables.unpack_layout(pages, frames, evolve(welcome, **{announced: 1}))


@pytest.mark.parametrize("name", [7, None, b"w", "x" * 4097, ["w"]], ids=lambda name: repr(name)[:20])
def test_a_name_left_out_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ProtocolError, match="a malformed layout came"):
        unpacked(columns(ROW), left_out=msgpack.packb({"name": [name]}))


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
    assert tables.unpack_regions(tables.pack_regions(regions), len(regions)) == regions
    assert tables.unpack_places(tables.pack_places(places), len(places)) == places


@pytest.mark.parametrize("count", [0, PAGE, PAGE + 1, 20_000])
def test_regions_and_places_of_any_number_arrive_as_they_were(count: int) -> None:
    regions = [RemoteRegion(i, 512, "cpu") for i in range(count)]
    places = {i: Place(i, 8) for i in range(count)}
    assert tables.unpack_regions(tables.pack_regions(regions), len(regions)) == regions
    assert tables.unpack_places(tables.pack_places(places), len(places)) == places


REGION: dict[str, Any] = {"id": 0, "nbytes": 512, "device": "cpu"}
PLACE: dict[str, Any] = {"storage": 0, "region": 0, "offset": 0}


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (REGION, {"nbytes": -1}),
        (REGION, {"device": 7}),
        (REGION, {"id": 0.0}),
        (REGION, {"id": True}),
        (PLACE, {"offset": -1}),
        (PLACE, {"region": None}),
        (PLACE, {"storage": "0"}),
        (PLACE, {"storage": [0]}),
    ],
)
def test_a_region_or_a_place_that_cannot_be_is_refused(row: dict[str, Any], change: dict[str, Any]) -> None:
    unpack = tables.unpack_regions if row is REGION else tables.unpack_places
    unpack([columns(row)], 1)
    with pytest.raises(ProtocolError, match="a malformed table of"):
        unpack([columns(row | change)], 1)
    with pytest.raises(ProtocolError, match="not msgpack"):
        unpack([b""], 1)


def test_more_regions_and_places_than_there_are_storages_are_refused() -> None:
    with pytest.raises(ProtocolError, match="more than 1 rows"):
        tables.unpack_regions([columns(REGION, REGION)], 1)
    with pytest.raises(ProtocolError, match="more than 1 rows"):
        tables.unpack_places([columns(PLACE, PLACE)], 1)


# What a table may cost.


def test_rows_that_are_long_lie_in_more_pages_and_arrive_as_they_were() -> None:
    layout = ModelLayout((), (), tuple(f"{i:05}" + "x" * 4000 for i in range(600)))
    pages, frames = tables.pack_layout(layout)
    assert pages.left_out > 2
    assert max(map(len, frames)) <= messages.MAX_MESSAGE
    assert [name for frame in frames for name in msgpack.unpackb(frame)["name"]] == list(layout.left_out)


def test_one_row_may_be_as_long_as_it_likes() -> None:
    tensor = TensorLayout("x" * 4096, "float32", (1,) * 64, (1,) * 64, 0, 0, Placement((1,) * 64, "y" * 4096))
    layout = ModelLayout((tensor,), (StorageLayout(4, "cpu"),))
    assert same(sent(layout), layout)


def test_a_page_that_is_too_long_is_refused_before_it_is_unpacked() -> None:
    page = columns(REGION)
    with pytest.raises(ProtocolError, match="a page has 1,048,577 bytes; it may have 1,048,576"):
        tables.unpack_regions([page + bytes(messages.MAX_MESSAGE + 1 - len(page))], 1)


def test_pages_that_are_too_long_together_are_refused_before_any_is_unpacked() -> None:
    """By how many rows there are to be: those of more rows may be longer."""
    padded = msgpack.packb({name: [value] for name, value in REGION.items()} | {"of the future": bytes(1_000_000)})
    tables.unpack_regions([padded] * 2, 2)
    with pytest.raises(ProtocolError, match=r"it has [\d,]+ bytes, and may have 2,098,688 for 3 rows"):
        tables.unpack_regions([padded] * 3, 3)
    assert len(tables.unpack_regions([padded] * 3, 3000)) == 3


@given(values=st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_digests_arrive_as_they_were(values: list[int]) -> None:
    assert tables.unpack_digests(tables.pack_digests(values), len(values)) == values


def test_many_digests_arrive_as_they_were_in_frames_of_bounded_length() -> None:
    frames = tables.pack_digests(range(20_000))
    assert max(map(len, frames)) == 8 * PAGE
    assert tables.unpack_digests(frames, 20_000) == list(range(20_000))
    assert [tables.one_digest(frames, i)[:2] for i in (0, 499, 500, 19_999)] == [
        i.to_bytes(2, "little") for i in (0, 499, 500, 19_999)
    ]


@pytest.mark.parametrize("frames", [[], [bytes(8)], [bytes(24)], [bytes(15)], [bytes(16), b"x"]], ids=repr)
def test_another_number_of_digests_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match="bytes came for 2 digests"):
        tables.unpack_digests(frames, 2)


def test_layouts_differ_where_places_do() -> None:
    """The reason for `same`."""
    layout = long(2)
    moved = evolve(layout, tensors=(evolve(layout.tensors[0], storage=1), layout.tensors[1]))
    assert layout == moved
    assert not same(layout, moved)
