"""Memory that is unmapped before a fork over ZeroMQ or during it: the fork hears so, and the seed's process lives."""

from typing import Any

import pytest
import torch
from mapped_memory import PAGE, MappedMemory
from processes import Child

import tensorfork
from tensorfork import TransferFailed
from tensorfork.memory import host_reads

pytestmark = pytest.mark.slow

SECONDS = 60.0
"""A deadline that is easily met."""
PAGES = 25_000
"""Pages of the memory that goes: far more than is under way at any time."""
KEPT = {"kept": torch.arange(10_000)}
FORMS = pytest.mark.parametrize("form", ["one large tensor", "many small ones"])
WAYS = pytest.mark.parametrize("way", ["process_vm_writev", "pwrite"])


def over(memory: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """A model of which all but one tensor lie in this memory."""
    parts = [memory] if form == "one large tensor" else memory.split(20 * PAGE + 5)
    return {f"t{i}": part for i, part in enumerate(parts)} | KEPT


def seed_whose_memory_goes(pipe: Any, form: str, way: str) -> None:
    """Publish; on request, unmap the memory's pages from some page on."""
    if way == "pwrite":
        host_reads._process_vm_writev = None
    with (
        MappedMemory(PAGES, 1) as memory,
        tensorfork.publish(over(memory.tensor, form), transports=["zeromq"]) as seed,
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
    model = over(torch.empty(PAGES * PAGE, dtype=torch.uint8), form)
    return {name: torch.zeros_like(tensor) for name, tensor in model.items()}


def fork(address: str, ours: dict[str, torch.Tensor], **options: Any) -> None:
    tensorfork.fork_into(ours, address, transport="zeromq", verify=False, timeout=SECONDS, **options)


def check_that_the_seed_lives(address: str) -> None:
    ours = {"kept": torch.zeros(10_000, dtype=torch.int64)}
    fork(address, ours, include="kept")
    assert torch.equal(ours["kept"], KEPT["kept"])


@FORMS
@WAYS
def test_memory_that_went_before_the_fork_came_fails_it_and_the_seed_serves_the_next(form: str, way: str) -> None:
    with Child(seed_whose_memory_goes, form, way) as seed:
        address = seed.recv()
        seed.request(PAGES - 1)
        with pytest.raises(TransferFailed, match="cannot read that memory any more"):
            fork(address, destination(form))
        check_that_the_seed_lives(address)


@FORMS
@WAYS
def test_memory_that_goes_during_a_fork_fails_it_and_the_seed_serves_the_next(form: str, way: str) -> None:
    with Child(seed_whose_memory_goes, form, way) as seed:
        address = seed.recv()
        unmapped: list[int] = []

        def progress(moved: int, total: int) -> None:
            if moved and not unmapped:
                unmapped.append(moved)
                seed.request(1)

        with pytest.raises(TransferFailed, match="cannot read that memory any more"):
            fork(address, destination(form), progress=progress)
        assert unmapped
        check_that_the_seed_lives(address)
