"""Memory that is unmapped before a fork over gloo or during it: the fork hears so, and the seed's process lives."""

from typing import Any

import pytest
import torch
from group_seeds import SECONDS, SLOW, equal
from mapped_memory import PAGE, MappedMemory
from processes import Child
from vmm import VirtualMemory

import tensorfork
from tensorfork import SeedMoved, TransferFailed
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.process_group.gloo import GlooGroup

pytestmark = pytest.mark.slow

PAGES = 1000
"""Pages of the memory that goes: their transfer takes a second."""
KEPT = {"kept": torch.arange(10_000)}
FORMS = pytest.mark.parametrize("form", ["one large tensor", "many small ones"])


def over(memory: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """A model of which all but one tensor lie in this memory."""
    parts = [memory] if form == "one large tensor" else memory.split(2 * PAGE + 5)
    return {f"t{i}": part for i, part in enumerate(parts)} | KEPT


def seed_whose_memory_goes(pipe: Any, form: str) -> None:
    """Publish; on request, unmap the memory's pages from some page on."""
    with (
        MappedMemory(PAGES, 1) as memory,
        tensorfork.publish(over(memory.tensor, form), transports=[Gloo(rate_limit=SLOW)]) as seed,
    ):
        pipe.send(seed.address)
        while True:
            try:
                (page,) = pipe.recv()
            except EOFError:
                return
            memory.unmap(page)
            pipe.send("unmapped")


def destination(form: str) -> dict[str, torch.Tensor]:
    zeros = over(torch.zeros(PAGES * PAGE, dtype=torch.uint8), form)
    return {name: torch.zeros_like(tensor) for name, tensor in zeros.items()}


def fork(address: str, ours: dict[str, torch.Tensor], **options: Any) -> None:
    tensorfork.fork_into(ours, address, transport="gloo", verify=False, timeout=SECONDS, **options)


def check_that_the_seed_lives(address: str) -> None:
    ours = {"kept": torch.zeros(10_000, dtype=torch.int64)}
    fork(address, ours, include="kept")
    assert equal(ours, KEPT)


@FORMS
def test_memory_that_went_before_the_fork_came_fails_it_and_the_seed_serves_the_next(form: str) -> None:
    with Child(seed_whose_memory_goes, form) as seed:
        address = seed.recv()
        seed.request(PAGES - 1)
        ours = destination(form)
        with pytest.raises(TransferFailed, match="cannot read that memory any more"):
            fork(address, ours)
        check_that_the_seed_lives(address)


@FORMS
def test_memory_that_goes_during_a_fork_fails_it_and_the_seed_serves_the_next(form: str) -> None:
    with Child(seed_whose_memory_goes, form) as seed:
        address = seed.recv()
        unmapped: list[int] = []

        def progress(moved: int, total: int) -> None:
            if moved and not unmapped:
                unmapped.append(moved)
                seed.request(PAGES // 2)

        with pytest.raises(TransferFailed, match="cannot read that memory any more"):
            fork(address, destination(form), progress=progress)
        assert unmapped
        check_that_the_seed_lives(address)


GPU_BYTES = 4 << 20


def seed_whose_gpu_memory_goes(pipe: Any) -> None:
    """Publish; unmap the memory before the third batch is read. On request, say whether CUDA still works."""
    read, left = GlooGroup._read, [3]

    def unmap_and_read(group: GlooGroup, *arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            memory.unmap()
        read(group, *arguments)

    with VirtualMemory(0, GPU_BYTES) as memory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooGroup, "_read", unmap_and_read)
        tensor = memory.tensor().fill_(7)
        with tensorfork.publish({"t": tensor}, transports=[Gloo(bucket=256 << 10)]) as seed:
            pipe.send(seed.address)
            pipe.recv()
            pipe.send(int(torch.ones(1000, device="cuda:0").sum()))


@pytest.mark.gpu(1)
def test_gpu_memory_that_is_unmapped_during_a_fork_fails_it_and_the_seed_lives() -> None:
    with Child(seed_whose_gpu_memory_goes) as seed:
        address = seed.recv()
        with pytest.raises((TransferFailed, SeedMoved)):
            fork(address, {"t": torch.zeros(GPU_BYTES, dtype=torch.uint8)})
        assert seed.request("alive") == 1000
