"""Digests of tensors on the CPU that are read through the kernel: the same, and memory may be gone meanwhile."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapped_memory import PAGE, MappedMemory

from tensorfork.digest import reads
from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.reads import CheckedReads
from tensorfork.memory import host_reads
from tensorfork.memory.host_reads import UnreadableMemory

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "large": lambda memory: memory,
    "small": lambda memory: memory[-100:],
    "misaligned": lambda memory: memory[-4001:-3],
    "transposed": lambda memory: memory.view(torch.int32).view(-1, 64).t(),
    "with gaps": lambda memory: memory.view(torch.int16)[::3],
    "a column": lambda memory: memory.view(torch.float64).view(-1, 64)[:, 5],
    "overlapping": lambda memory: memory[-PAGE:].view(-1, 64).expand(9, PAGE // 64, 64),
}


def digest(tensor: torch.Tensor, *, checked_reads: bool) -> int:
    return DigestBatch.of({"x": tensor}).compute(checked_reads=checked_reads)["x"]


@pytest.fixture(params=["process_vm_writev", "pwrite"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to read: a container may forbid the first."""
    if request.param == "pwrite":
        monkeypatch.setattr(host_reads, "_process_vm_writev", None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
def test_the_digest_is_the_same_and_memory_that_is_gone_is_an_error(form: str) -> None:
    with MappedMemory(700) as memory:
        tensor = FORMS[form](memory.tensor)
        assert digest(tensor, checked_reads=True) == digest(tensor, checked_reads=False)
        memory.unmap(699)
        with pytest.raises(UnreadableMemory):
            digest(tensor, checked_reads=True)


@pytest.mark.parametrize("form", ["dense", "with gaps"])
def test_a_storage_that_was_resized_to_nothing_is_an_error(form: str) -> None:
    tensor = torch.ones(5000) if form == "dense" else torch.ones(100, 50)[:, ::2]
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnreadableMemory):
        digest(tensor, checked_reads=True)


def test_memory_that_goes_while_digests_are_computed_is_an_error() -> None:
    with MappedMemory(100) as memory:
        batch = DigestBatch.of({"first": torch.ones(400_000), "second": memory.tensor})

        def cancelled() -> bool:  # asked after the longest
            memory.unmap()
            return False

        with pytest.raises(UnreadableMemory):
            batch.compute(cancelled, checked_reads=True)


@settings(max_examples=60)
@given(data=st.data())
def test_slabs_are_a_tensor_s_elements_in_order_whatever_its_gaps(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
    stride = [data.draw(st.integers(0, 300)) for _ in shape]
    extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    tensor = torch.arange(extent + 3, dtype=torch.int16)[3:].as_strided(shape, stride)
    most = data.draw(st.integers(1, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "_EXTENT", at_once := data.draw(st.sampled_from([2, 100, 5000])))
        slabs = []
        for slab in CheckedReads(torch.device("cpu")).slabs(tensor, most):
            assert slab.numel() <= most
            assert reads._extent(slab) <= at_once
            slabs.append(slab.clone())
    order = sorted(range(len(shape)), key=lambda i: (-stride[i], -shape[i]))
    assert torch.equal(torch.cat([slab.reshape(-1) for slab in slabs]), tensor.permute(order).reshape(-1))


def test_tensors_of_one_odd_size_are_gathered_with_zeros_between_them() -> None:
    tensors = [torch.full((13,), i, dtype=torch.uint8) for i in (1, 2, 3)]
    rows = torch.full((4, 2), -1)
    CheckedReads(torch.device("cpu")).gather(rows[:3], tensors, 3, 9)
    assert rows.view(torch.uint8).tolist() == [*([i] * 9 + [0] * 7 for i in (1, 2, 3)), [255] * 16]
