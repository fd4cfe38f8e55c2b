"""On a GPU: copies from and to memory that is not mapped are errors, and what the driver says of such memory."""

import os
import sys
import time
from typing import Any

import pytest
import torch
from vmm import VirtualMemory

from tensorfork import Region
from tensorfork.memory import allocations, cuda, host_reads, streams
from tensorfork.memory.allocations import MappedMemory
from tensorfork.memory.copy_batch import copy_batch

pytestmark = pytest.mark.gpu(1)

MIB = 1 << 20
N = 4 * MIB


def gpu(device: int = 0) -> torch.Tensor:
    return torch.zeros(N, dtype=torch.uint8, device=f"cuda:{device}")


@pytest.mark.parametrize("gone", ["all", "the second half"])
@pytest.mark.parametrize("way", ["to host", "to device", "from", "into", "batch from", "batch into"])
def test_a_copy_that_touches_memory_that_is_not_mapped_is_an_error_and_the_context_lives(way: str, gone: str) -> None:
    stream = streams.acquire_stream(0)
    pinned, ours = torch.zeros(N, dtype=torch.uint8, pin_memory=True), gpu()
    with VirtualMemory(0, N // 2, 2) as memory:
        memory.unmap(*([0, 1] if gone == "all" else [1]))
        copies: dict[str, tuple[Any, tuple[int, int]]] = {
            "to host": (cuda.copy_to_host, (pinned.data_ptr(), memory.address)),
            "to device": (cuda.copy_to_device, (memory.address, pinned.data_ptr())),
            "from": (cuda.copy_one_by_one, (ours.data_ptr(), memory.address)),
            "into": (cuda.copy_one_by_one, (memory.address, ours.data_ptr())),
            "batch from": (copy_batch, (ours.data_ptr(), memory.address)),
            "batch into": (copy_batch, (memory.address, ours.data_ptr())),
        }
        copy, (to, source) = copies[way]
        other = gpu()
        fine = (other.data_ptr(), other.data_ptr(), 8) if "batch" in way else None
        with pytest.raises(cuda.DriverError):
            copy(stream, [*([fine] if fine else []), (to, source, N)])
        stream.synchronize()
    assert ours.sum().item() == 0
    streams.release_stream(stream)


@pytest.mark.gpu(2)
def test_copies_between_gpus_arrive_one_by_one_and_in_one_call() -> None:
    stream = streams.acquire_stream(1)
    source, into = torch.arange(N, device="cuda:0").to(torch.uint8), gpu(1)
    torch.cuda.synchronize(0)
    for copy in (cuda.copy_one_by_one, copy_batch):
        into.zero_()
        torch.cuda.synchronize(1)
        copy(stream, [(into.data_ptr() + i, source.data_ptr() + i, MIB) for i in range(0, N, MIB)])
        stream.synchronize()
        assert torch.equal(into.cpu(), source.cpu())
    streams.release_stream(stream)


def region(memory: VirtualMemory) -> list[Region]:
    return [Region(5, memory.address + 100, memory.nbytes - 200, "cuda:0")]


def test_each_mapping_of_a_reservation_is_an_allocation() -> None:
    with VirtualMemory(0, 6 * MIB, 4) as memory:
        found = allocations.allocations_of(region(memory))
        assert [(one.start, one.nbytes) for one in found] == [
            (memory.address + i * memory.piece, memory.piece) for i in range(4)
        ]
        assert len({one.buffer_id for one in found}) == 4
        assert not any(one.exportable for one in found)
        assert allocations.why_not_exportable(found)


def test_a_mapping_that_goes_or_changes_is_noticed_whichever_of_the_region_it_is() -> None:
    with VirtualMemory(0, 6 * MIB, 3) as memory:
        for piece in range(3):
            mapped = MappedMemory.of(region(memory))
            assert mapped.moved() == {}
            memory.unmap(piece)
            assert mapped.moved() == {5: "its memory is not mapped any more"}
            assert set(allocations.why_unmapped(region(memory))) == {5}
            memory.map(piece)
            assert mapped.moved() == {5: "its memory was unmapped, and mapped anew"}
            assert allocations.why_unmapped(region(memory)) == {}


def test_memory_of_torch_that_is_freed_is_noticed() -> None:
    memory = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:0")
    regions = [Region(1, memory.data_ptr(), memory.nbytes, "cuda:0")]
    mapped = MappedMemory.of(regions)
    del memory
    torch.cuda.empty_cache()
    assert mapped.moved() == {1: "its memory is not mapped any more"}


def test_the_look_at_many_mappings_is_quick() -> None:
    """A quarter of a gigabyte of ``expandable_segments`` that are all small."""
    with VirtualMemory(0, 2 * MIB, 128) as memory:
        begun = time.perf_counter()
        mapped = MappedMemory.of(region(memory))
        found = time.perf_counter() - begun
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            assert mapped.moved() == {}
            seconds.append(time.perf_counter() - begun)
        print(f"128 mappings found in {found * 1e3:.1f} ms, looked at in {min(seconds) * 1e6:.0f} µs", file=sys.stderr)
        assert min(seconds) < 0.005


@pytest.mark.parametrize("nbytes", [1000, 5 * MIB])
def test_pinned_memory_is_read_through_the_kernel_like_any_other(nbytes: int) -> None:
    source = torch.frombuffer(bytearray(os.urandom(nbytes)), dtype=torch.uint8).pin_memory()
    for pinned in (False, True):
        into = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        host_reads.read([(source.data_ptr(), nbytes)], into.data_ptr())
        assert torch.equal(into, source)
