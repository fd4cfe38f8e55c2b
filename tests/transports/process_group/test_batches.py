"""What process groups refuse before anything starts, and their pure parts: batches, pages, regions that touch."""

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
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group import NCCL, Gloo
from tensorfork.transports.process_group.batches import MAX_RANGES, Batch, Limits, decode_page, encode_pages, schedule
from tensorfork.transports.process_group.region_tensors import merge_adjacent

SECONDS = 60.0
"""A deadline that is kept with ease."""


# Refusals.


def test_nccl_refuses_a_model_that_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(TransportUnavailable, match="use gloo, or zeromq"):
        NCCL().facts(GuardedMemory("cpu", [10], 1).regions)


def test_nccl_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without NCCL"):
        NCCL().facts(GuardedMemory("cpu", [10], 1).regions)


def test_gloo_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without gloo"):
        Gloo().facts(GuardedMemory("cpu", [10], 1).regions)


def test_gloo_refuses_a_host_without_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", list)
    with pytest.raises(TransportUnavailable, match="interface"):
        Gloo().facts(GuardedMemory("cpu", [10], 1).regions)


def test_memory_that_is_neither_cpu_nor_cuda_is_refused() -> None:
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


def send_gpu_facts(pipe: Any) -> None:
    """A process that `NCCL` takes for one with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        pipe.send(gpu_facts(patch))


def gpu_facts(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The facts of `NCCL` for a GPU, which need not exist: another one each time."""
    patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    patch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    patch.setattr(cuda, "device_uuid", lambda _: secrets.token_hex(8))
    return dict(NCCL().facts([tensorfork.Region(0, 0, 10, "cuda:0")]))


def test_nccl_refuses_a_seed_within_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, fork = gpu_facts(monkeypatch), gpu_facts(monkeypatch)
    assert "one process" in str(NCCL().why_not(fork, seed))
    assert "use cuda_ipc" in str(NCCL().why_not(fork, seed))
    with Child(send_gpu_facts) as other:
        assert NCCL().why_not(fork, other.recv()) is None
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a child of os.fork()
    assert NCCL().why_not(gpu_facts(monkeypatch), seed) is None


def test_gloo_accepts_a_seed_within_one_process() -> None:
    facts = Gloo().facts(GuardedMemory("cpu", [10], 1).regions)
    assert Gloo().why_not(facts, facts) is None


@pytest.mark.parametrize("options", [{"rate_limit": 0}, {"parcel": 0}, {"small": 0}, {"bucket": 10, "small": 11}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"bytes"):
        Gloo(**options)  # type: ignore[arg-type]


def test_an_offer_that_cannot_be_read_is_refused() -> None:
    for offer in (b"", b"\xc1", msgpack.packb(["token", 0, 1, 1, 1, [None] * 3, "host"]), msgpack.packb([1, 2])):
        with pytest.raises(ProtocolError, match="offer"):
            Gloo().open(offer, "127.0.0.1", [], [], QueueChannel(lambda _: None), time.monotonic() + SECONDS)


# Pure functions.


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2)), max_size=20),
    limits=st.tuples(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 600)),
)
def test_batches_hold_every_byte_once_and_keep_to_the_limits(
    sizes: list[tuple[int, int]], limits: tuple[int, int, int]
) -> None:
    copies, offset = [], 0
    for nbytes, _ in sizes:
        copies.append(Copy(0, 5, 3 * offset, 6, 7 * offset, nbytes))
        offset += nbytes
    groups = [group for _, group in sizes]
    limit = Limits(*limits)
    batches = list(schedule(copies, groups, dict.fromkeys(range(3), limit)))
    covered = [0] * len(copies)
    for batch in batches:
        assert 0 < len(batch.copies) <= MAX_RANGES
        assert batch.nbytes <= (limit.bucket if batch.packed else limit.batch)
        for i, (region, source, nbytes), (into, destination, same) in zip(
            batch.copies, batch.sources, batch.destinations, strict=True
        ):
            assert (region, into, nbytes) == (5, 6, same)
            assert source - copies[i].offset == destination - copies[i].at == covered[i]
            assert batch.group == groups[i]
            assert batch.packed == (copies[i].nbytes < limit.small)
            covered[i] += nbytes
    assert covered == [copy.nbytes for copy in copies]
    decoded = [batch for page, _ in encode_pages(batches) for batch in decode_page(page)]
    assert decoded == [(batch.group, batch.packed, list(batch.sources)) for batch in batches]


def test_pages_are_bounded_and_come_with_their_batches() -> None:
    copies = [Copy(0, 1, i * 10, 1, i * 10, 10) for i in range(60_000)]
    batches = list(schedule(copies, [0] * len(copies), {0: Limits(100, 100_000, 100)}))
    pages = list(encode_pages(batches))
    assert len(pages) > 2
    assert all(len(page) <= 1 << 19 for page, _ in pages)
    assert [batch for _, on_page in pages for batch in on_page] == batches
    for page, on_page in pages:
        assert decode_page(page) == [(batch.group, batch.packed, list(batch.sources)) for batch in on_page]


def test_a_page_is_written_while_the_batches_before_it_move() -> None:
    copies = [Copy(0, 1, i * 10, 1, i * 10, 10) for i in range(40)]
    made = []

    def batches() -> Iterator[Batch]:
        for batch in schedule(copies, [0] * len(copies), {0: Limits(10, 10, 1)}):
            made.append(batch)
            yield batch

    assert [(len(on_page), len(made)) for _, on_page in encode_pages(batches())] == [
        (1, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (8, 40),
    ]  # fmt: skip


def test_the_first_batch_starts_soon_and_later_ones_grow() -> None:
    copies = [Copy(0, 1, i << 20, 1, i << 20, 1 << 20) for i in range(8000)]
    ranges = [len(one.copies) for one in schedule(copies, [0] * 8000, {0: Limits(1 << 30, 1, 1)})]
    assert ranges == [128, 256, 512, 1024, 1024, 1024, 1024, 1024, 1024, 960]
    megabytes = [one.nbytes >> 20 for one in schedule([Copy(0, 1, 0, 1, 0, 5 << 30)], [0], {0: Limits(1 << 30, 1, 1)})]
    assert megabytes == [512, 1024, 1024, 1024, 1024, 512]


def test_groups_take_turns() -> None:
    copies = [Copy(0, 1, i * 100, 1, i * 100, 100) for i in range(8)]
    batches = schedule(copies, [0] * 4 + [1] * 4, {0: Limits(100, 1, 1), 1: Limits(100, 1, 1)})
    assert [batch.group for batch in batches] == [0, 1] * 4


def test_small_batches_go_between_large_ones_and_not_last() -> None:
    copies = [Copy(0, 1, i * 100, 1, i * 100, 100 if i % 2 else 10) for i in range(8)]
    batches = schedule(copies, [0] * 8, {0: Limits(100, 20, 50)})
    assert [batch.packed for batch in batches] == [False, True, False, True, False, False]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_refused(page: bytes) -> None:
    try:
        decode_page(page)
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
    merged, places = merge_adjacent(regions)
    assert [(one.id, one.address, one.nbytes) for one in merged] == [(4, 1000, 150), (2, 1151, 10), (3, 1161, 10)]
    assert [(place.region, place.offset) for place in places] == [(4, 0), (4, 100), (2, 0), (3, 0), (2, 4)]
