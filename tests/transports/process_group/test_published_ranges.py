"""Only what was published is sent, in batches that the seed can copy before it sends them; over gloo."""

import threading
import time
from collections.abc import Sequence
from itertools import chain

import msgpack
import pytest
from attrs import evolve
from gloo_leases import BATCH, LOOPBACK, SECONDS, opened, recv, send, served
from hypothesis import given
from hypothesis import strategies as st

import tensorfork
from tensorfork import Copy, Region
from tensorfork.errors import TransferFailed
from tensorfork.memory import cuda
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.regions import may_read
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group import Gloo, gloo
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.pair_group import FORK, SEED
from tensorfork.transports.process_group.region_tensors import RegionTensors, merge_adjacent

ByteRange = tuple[int, int, int]


class PartlyPublished(GuardedMemory):
    """Memory of which only these ranges of each region are published."""

    published: Sequence[tuple[int, int]] | None = None
    stable = False

    @property
    def regions(self) -> list[Region]:
        """See `GuardedMemory`."""
        return [evolve(region, published=self.published, stable=self.stable) for region in super().regions]


def page(packed: bool, *ranges: ByteRange) -> bytes:
    numbers = b"".join(number.to_bytes(8, "little") for number in chain.from_iterable(ranges))
    return b"\0\0" + bytes([packed, 0]) + len(ranges).to_bytes(4, "little") + numbers


# Ranges.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (99, 101), (199, 201), (200, 300), (150, 350), (599, 601), (0, 1000)]
)
def test_bytes_that_were_not_published_are_refused(start: int, end: int, packed: bool) -> None:
    memory, into = PartlyPublished("cpu", [1000], 1), GuardedMemory("cpu", [1000], 2)
    memory.published = [(100, 200), (300, 600)]
    made = Gloo().export(memory.regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    with served(made) as (channel, ended), opened(memory, into, channel, made.offer):
        id = memory.regions[0].id
        send(channel, "parcels", True, page(packed, (id, 100, 100), (id, start, end - start)))
        said = recv(channel)
        assert said[0] == "failed"
        assert "published" in said[1]
    assert ended
    assert into.first_difference() is None


def test_published_bytes_are_sent_to_their_edges() -> None:
    memory, into = PartlyPublished("cpu", [1000], 1), GuardedMemory("cpu", [1000], 2)
    memory.published = [(100, 200), (300, 600)]
    made = Gloo().export(memory.regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    source, destination = memory.regions[0].id, into.regions[0].id
    copies = [Copy(0, source, start, destination, start, end - start) for start, end in memory.published]
    with served(made) as (channel, _), opened(memory, into, channel, made.offer) as session:
        session.pull(copies, time.monotonic() + SECONDS, lambda _: None, threading.Event())
    for start, end in memory.published:
        into.expect(0, start, memory.view(0, start, end - start))
    assert into.first_difference() is None


@st.composite
def neighbours(draw: st.DrawFn) -> list[Region]:
    """Regions that touch, overlap or neither, some of them published in parts."""
    regions = []
    for id in range(draw.__call__(st.integers(1, 5))):
        nbytes = draw(st.integers(0, 12))
        published = None
        if draw(st.booleans()):
            edges = sorted(draw(st.sets(st.integers(0, nbytes), max_size=6)))
            published = list(zip(edges[::2], edges[1::2], strict=False))
        address = 1000 + draw(st.integers(0, 30))
        regions.append(Region(id, address, nbytes, draw(st.sampled_from(["cpu", "cuda:0"])), None, published))
    return regions


@given(neighbours())
def test_what_may_be_read_of_merged_regions_is_what_might_be_read_of_each(regions: list[Region]) -> None:
    merged, places = merge_adjacent(regions)
    by_id = {region.id: region for region in merged}
    readable: dict[str, set[int]] = {"cpu": set(), "cuda:0": set()}
    for region, place in zip(regions, places, strict=True):
        assert by_id[place.region].address + place.offset == region.address
        readable[region.device] |= {region.address + i for i in range(region.nbytes) if may_read(region, i, 1)}
        for start, end in region.published if region.published is not None else [(0, region.nbytes)]:
            assert may_read(by_id[place.region], place.offset + start, end - start)
    for device, expected in readable.items():
        found = [
            one.address + i for one in merged if one.device == device for i in range(one.nbytes) if may_read(one, i, 1)
        ]
        assert sorted(found) == sorted(expected)


def test_a_copy_may_cross_from_one_published_range_to_the_next_but_not_over_a_gap() -> None:
    first, second = Region(1, 1000, 100, "cpu"), Region(2, 1100, 50, "cpu", published=[(0, 20), (30, 50)])
    (merged,), _ = merge_adjacent([second, first])
    assert may_read(merged, 90, 30)
    assert not may_read(merged, 90, 31)
    assert not may_read(merged, 119, 12)


def test_merged_regions_are_stable_when_all_of_them_are() -> None:
    first, second = Region(1, 1000, 100, "cpu", stable=True), Region(2, 1100, 50, "cpu")
    (mixed,), _ = merge_adjacent([first, second])
    (stable,), _ = merge_adjacent([first, evolve(second, stable=True)])
    assert (mixed.stable, stable.stable) == (False, True)
    assert stable.published is None


# Batches.


@pytest.mark.parametrize(("packed", "stable", "most"), [(False, False, 1000), (True, False, 1000), (False, True, 4096)])
def test_a_batch_that_is_larger_than_the_offer_allows_is_refused(packed: bool, stable: bool, most: int) -> None:
    memory, into = PartlyPublished("cpu", [5000], 1), GuardedMemory("cpu", [5000], 2)
    memory.stable = stable
    made = Gloo(parcel=4096, bucket=1000, small=1000).export(memory.regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    with served(made) as (channel, _), opened(memory, into, channel, made.offer):
        id = memory.regions[0].id
        send(channel, "parcels", True, page(packed, (id, 0, 500), (id, 600, most - 499)))
        said = recv(channel)
        assert said[0] == "failed"
        assert "bucket" in said[1]


@pytest.mark.parametrize("stable", [False, True])
def test_stable_memory_is_sent_in_place_and_other_memory_from_buckets(
    stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With buckets smaller than a batch: the fork asks for what fits them."""
    memory, into = PartlyPublished("cpu", [5 * BATCH], 1), GuardedMemory("cpu", [5 * BATCH], 2)
    memory.stable = stable
    options = {"parcel": BATCH, "bucket": 1000, "small": 1}
    sent: list[int] = []
    read: list[int] = []
    broadcast, by_kernel = GlooGroup._broadcast, gloo.host_reads.read

    def watched_broadcast(group: GlooGroup, tensor: object, deadline: float) -> object:
        if group.rank == SEED and tensor.nbytes > 16:  # type: ignore[attr-defined]  # not the handshake
            sent.append(tensor.data_ptr())  # type: ignore[attr-defined]
        return broadcast(group, tensor, deadline)  # type: ignore[arg-type]

    def watched_read(spans: Sequence[tuple[int, int]], to: int) -> None:
        read.extend(nbytes for _, nbytes in spans)
        by_kernel(spans, to)

    monkeypatch.setattr(GlooGroup, "_broadcast", watched_broadcast)
    monkeypatch.setattr(gloo.host_reads, "read", watched_read)
    made = Gloo(**options).export(memory.regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    source, destination = memory.regions[0], into.regions[0].id
    copies = [Copy(0, source.id, i * BATCH, destination, i * BATCH, BATCH) for i in range(5)]
    with served(made) as (channel, _), opened(memory, into, channel, made.offer, **options) as session:
        session.pull(copies, time.monotonic() + SECONDS, lambda _: None, threading.Event())
    into.expect(0, 0, memory.view(0, 0, 5 * BATCH))
    assert into.first_difference() is None
    in_place = [source.address <= address < source.address + source.nbytes for address in sent]
    assert in_place == ([True] * 5 if stable else [False] * 25)
    assert read == ([] if stable else [1000, 1000, 1000, 1000, 96] * 5)


def test_one_region_that_is_not_stable_keeps_all_from_being_sent_in_place() -> None:
    stable, other = Region(1, 1000, 10, "cpu", stable=True), Region(2, 2000, 10, "cpu")
    on_gpu = Region(3, 3000, 10, "cuda:0")
    assert RegionTensors([stable, on_gpu]).stable
    assert not RegionTensors([stable, other]).stable


def test_an_offer_that_does_not_say_what_is_stable_is_refused() -> None:
    made = Gloo().export(GuardedMemory("cpu", [10], 1).regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    fields = msgpack.unpackb(made.offer)
    assert made.close(time.monotonic() + SECONDS)
    for changed in ([*fields[:5], 2, *fields[6:]], [*fields[:5], *fields[6:]]):
        with pytest.raises(tensorfork.ProtocolError, match="offer"):
            Gloo().open(msgpack.packb(changed), "127.0.0.1", [], [], None, time.monotonic() + SECONDS)  # type: ignore[arg-type]


# GPU memory.


@pytest.mark.parametrize("rank", [SEED, FORK])
def test_gpu_memory_that_the_driver_refuses_is_an_error_once_nothing_uses_the_bucket(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []

    class Stream:
        def synchronize(self) -> None:
            happened.append("synchronized")

    def refuse(stream: Stream, copies: Sequence[tuple[int, int, int]]) -> None:
        happened.append(list(copies))
        raise cuda.DriverError("CUDA_ERROR_INVALID_VALUE")

    monkeypatch.setattr(cuda, "copy_to_host" if rank == SEED else "copy_to_device", refuse)
    group = object.__new__(GlooGroup)
    group._regions, group._stream = RegionTensors([Region(7, 5000, 100, "cuda:0")]), Stream()
    bucket = GuardedMemory("cpu", [100], 1).view(0, 0, 100)
    at = bucket.data_ptr()
    if rank == SEED:
        with pytest.raises(UnreadableMemory):
            group._read([(7, 10, 20), (7, 50, 5)], bucket)
        assert happened == [[(at, 5010, 20), (at + 20, 5050, 5)], "synchronized"]
    else:
        with pytest.raises(TransferFailed):
            group._write([(7, 10, 20), (7, 50, 5)], bucket)
        assert happened == [[(5010, at, 20), (5050, at + 20, 5)], "synchronized"]
