"""What process groups refuse before anything starts, and what of them is pure: parcels, pages, regions that touch."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child

import tensorfork
from tensorfork import Copy, TransportUnavailable
from tensorfork.errors import ProtocolError
from tensorfork.memory import cuda
from tensorfork.testing.ends import Speaker
from tensorfork.testing.memory import Memory
from tensorfork.transports.process_group import NCCL, Gloo
from tensorfork.transports.process_group.batches import STRETCHES, Batch, Limits, pages, read_page, schedule
from tensorfork.transports.process_group.region_tensors import merge_touching

SECONDS = 60.0
"""A deadline that is kept with ease."""


# Refusals.


def test_nccl_refuses_a_model_that_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(TransportUnavailable, match="use gloo, or zeromq"):
        NCCL().facts(Memory("cpu", [10], 1).regions)


def test_nccl_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without NCCL"):
        NCCL().facts(Memory("cpu", [10], 1).regions)


def test_gloo_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without gloo"):
        Gloo().facts(Memory("cpu", [10], 1).regions)


def test_gloo_refuses_a_host_without_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", list)
    with pytest.raises(TransportUnavailable, match="interface"):
        Gloo().facts(Memory("cpu", [10], 1).regions)


def test_memory_of_other_kinds_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="mps:0"):
        Gloo().facts([tensorfork.Region(0, 0, 10, "mps:0")])


GPU_FACTS = {"devices": ["cuda:0"], "gpus": ["GPU-a"], "version": [2, 27, 7], "process": b"one"}
OTHER_FACTS = GPU_FACTS | {"gpus": ["GPU-b"], "process": b"other"}


def test_nccl_refuses_two_processes_on_one_gpu() -> None:
    assert NCCL().why_not(GPU_FACTS, OTHER_FACTS) is None
    assert "the same GPU" in str(NCCL().why_not(GPU_FACTS, OTHER_FACTS | {"gpus": ["GPU-b", "GPU-a"]}))


def test_nccl_refuses_another_version_of_itself() -> None:
    other = OTHER_FACTS | {"version": [2, 26, 2]}
    assert "2.27.7 here and 2.26.2" in str(NCCL().why_not(GPU_FACTS, other))


def said_of_gpus(pipe: Any) -> None:
    """A process with a GPU, as far as `NCCL` can tell."""
    with pytest.MonkeyPatch.context() as patch:
        pipe.send(facts_of_gpus(patch))


def facts_of_gpus(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `NCCL` says of a GPU, which need not be there: another one each time."""
    patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    patch.setattr(cuda, "device_uuid", lambda _: secrets.token_hex(8))
    return dict(NCCL().facts([tensorfork.Region(0, 0, 10, "cuda:0")]))


def test_nccl_refuses_a_seed_within_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, fork = facts_of_gpus(monkeypatch), facts_of_gpus(monkeypatch)
    assert "one process" in str(NCCL().why_not(fork, seed))
    assert "use cuda_ipc" in str(NCCL().why_not(fork, seed))
    with Child(said_of_gpus) as other:
        assert NCCL().why_not(fork, other.hear()) is None
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a child of os.fork()
    assert NCCL().why_not(facts_of_gpus(monkeypatch), seed) is None


def test_gloo_takes_a_seed_within_one_process() -> None:
    facts = Gloo().facts(Memory("cpu", [10], 1).regions)
    assert Gloo().why_not(facts, facts) is None


@pytest.mark.parametrize("options", [{"rate_limit": 0}, {"parcel": 0}, {"small": 0}, {"bucket": 10, "small": 11}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"bytes"):
        Gloo(**options)  # type: ignore[arg-type]


def test_an_offer_that_is_none_is_refused() -> None:
    for offer in (b"", b"\xc1", msgpack.packb(["token", 0, 1, 1, 1, [None] * 3, "host"]), msgpack.packb([1, 2])):
        with pytest.raises(ProtocolError, match="offer"):
            Gloo().open(offer, "127.0.0.1", [], [], Speaker(lambda _: None), time.monotonic() + SECONDS)


# What is pure.


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2)), max_size=20),
    limits=st.tuples(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 600)),
)
def test_parcels_hold_every_byte_once_and_keep_to_the_limits(
    sizes: list[tuple[int, int]], limits: tuple[int, int, int]
) -> None:
    copies, at = [], 0
    for nbytes, _ in sizes:
        copies.append(Copy(0, 5, 3 * at, 6, 7 * at, nbytes))
        at += nbytes
    lanes = [lane for _, lane in sizes]
    limit = Limits(*limits)
    parcels = list(schedule(copies, lanes, dict.fromkeys(range(3), limit)))
    reached = [0] * len(copies)
    for parcel in parcels:
        assert 0 < len(parcel.copies) <= STRETCHES
        assert parcel.nbytes <= (limit.bucket if parcel.packed else limit.parcel)
        for i, (region, offset, nbytes), (into, start, also) in zip(
            parcel.copies, parcel.theirs, parcel.ours, strict=True
        ):
            assert (region, into, nbytes) == (5, 6, also)
            assert offset - copies[i].offset == start - copies[i].at == reached[i]
            assert parcel.lane == lanes[i]
            assert parcel.packed == (copies[i].nbytes < limit.small)
            reached[i] += nbytes
    assert reached == [copy.nbytes for copy in copies]
    read = [parcel for page, _ in pages(parcels) for parcel in read_page(page)]
    assert read == [(parcel.lane, parcel.packed, list(parcel.theirs)) for parcel in parcels]


def test_pages_are_bounded_and_have_their_parcels() -> None:
    copies = [Copy(0, 1, i * 10, 1, i * 10, 10) for i in range(60_000)]
    parcels = list(schedule(copies, [0] * len(copies), {0: Limits(100, 100_000, 100)}))
    book = list(pages(parcels))
    assert len(book) > 2
    assert all(len(page) <= 1 << 19 for page, _ in book)
    assert [parcel for _, held in book for parcel in held] == parcels
    for page, held in book:
        assert read_page(page) == [(parcel.lane, parcel.packed, list(parcel.theirs)) for parcel in held]


def test_a_page_is_written_while_what_came_before_it_moves() -> None:
    copies = [Copy(0, 1, i * 10, 1, i * 10, 10) for i in range(40)]
    drawn = []

    def drawing() -> Iterator[Batch]:
        for parcel in schedule(copies, [0] * len(copies), {0: Limits(10, 10, 1)}):
            drawn.append(parcel)
            yield parcel

    assert [(len(held), len(drawn)) for _, held in pages(drawing())] == [
        (1, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (8, 40),
    ]  # fmt: skip


def test_the_first_parcel_is_begun_soon_and_those_behind_it_grow() -> None:
    copies = [Copy(0, 1, i << 20, 1, i << 20, 1 << 20) for i in range(8000)]
    many = [len(one.copies) for one in schedule(copies, [0] * 8000, {0: Limits(1 << 30, 1, 1)})]
    assert many == [128, 256, 512, 1024, 1024, 1024, 1024, 1024, 1024, 960]
    long = [one.nbytes >> 20 for one in schedule([Copy(0, 1, 0, 1, 0, 5 << 30)], [0], {0: Limits(1 << 30, 1, 1)})]
    assert long == [512, 1024, 1024, 1024, 1024, 512]


def test_lanes_take_turns() -> None:
    copies = [Copy(0, 1, i * 100, 1, i * 100, 100) for i in range(8)]
    parcels = schedule(copies, [0] * 4 + [1] * 4, {0: Limits(100, 1, 1), 1: Limits(100, 1, 1)})
    assert [parcel.lane for parcel in parcels] == [0, 1] * 4


def test_small_parcels_go_between_large_ones_and_not_last() -> None:
    copies = [Copy(0, 1, i * 100, 1, i * 100, 100 if i % 2 else 10) for i in range(8)]
    parcels = schedule(copies, [0] * 8, {0: Limits(100, 20, 50)})
    assert [parcel.packed for parcel in parcels] == [False, True, False, True, False, False]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_refused(page: bytes) -> None:
    try:
        read_page(page)
    except ProtocolError:
        return


def test_regions_that_touch_become_one_and_no_byte_is_added() -> None:
    regions = [
        tensorfork.Region(4, 1000, 100, "cpu"),
        tensorfork.Region(1, 1100, 50, "cpu"),
        tensorfork.Region(2, 1151, 10, "cpu"),
        tensorfork.Region(3, 1161, 10, "cuda:0"),
        tensorfork.Region(9, 1155, 3, "cpu"),
    ]
    joined, places = merge_touching(regions)
    assert [(one.id, one.address, one.nbytes) for one in joined] == [(4, 1000, 150), (2, 1151, 10), (3, 1161, 10)]
    assert [(place.region, place.offset) for place in places] == [(4, 0), (4, 100), (2, 0), (3, 0), (2, 4)]
