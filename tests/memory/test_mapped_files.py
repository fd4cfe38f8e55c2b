"""What is found out about memory that maps files, without touching it."""

import mmap
import os
from pathlib import Path

import pytest
import torch
from file_maps import COUNT, copy_on_write, read_only, written
from mapped_memory import PAGE, MappedMemory

from tensorfork.memory import host_reads
from tensorfork.memory.mapped_files import MappedFiles, any_in, why_not_usable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written(tmp_path / "weights")
    return tmp_path / "weights"


def span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_of_a_truncated_file_the_tensors_beyond_its_end_are_named(path: Path) -> None:
    mapped = copy_on_write(path)
    spans = {"first": span(mapped[:1024]), "second": span(mapped[1000:1025]), "last": span(mapped[-1:])}
    files = MappedFiles.of(spans)
    assert files.truncated() == {}
    os.truncate(path, 4096)
    assert list(files.truncated()) == ["second", "last"]
    assert "maps the file weights, which was truncated: it needs 4,100 bytes" in files.truncated()["second"]
    assert f"maps the file {path}," in why_not_usable(spans, writing=False)["last"]


@pytest.mark.parametrize("how", ["replaced", "deleted", "longer"])
def test_a_file_that_is_replaced_deleted_or_grows_changes_nothing(path: Path, how: str) -> None:
    spans = {"w": span(copy_on_write(path))}
    mapped = copy_on_write(path)
    spans = {"w": span(mapped)}
    files = MappedFiles.of(spans)
    if how == "longer":
        os.truncate(path, 8 * COUNT)
    else:
        path.unlink()
    if how == "replaced":
        path.write_bytes(b"short")
    assert files.truncated() == {}
    assert why_not_usable(spans, writing=True) == {}
    assert mapped[-1] == COUNT - 1


def test_read_only_memory_can_be_read_and_not_written(path: Path) -> None:
    spans = {"w": span(read_only(path))}
    mapped = read_only(path)
    spans = {"w": span(mapped)}
    assert why_not_usable(spans, writing=False) == {}
    assert f"its memory is read-only (it maps {path})" in why_not_usable(spans, writing=True)["w"]


def test_memory_that_is_protected_can_be_neither() -> None:
    with MappedMemory(pages=3) as memory:
        spans = {f"page {i}": (memory.address + i * PAGE, memory.address + (i + 1) * PAGE) for i in range(3)}
        memory.unmap(2)
        for writing in (False, True):
            assert list(why_not_usable(spans, writing=writing)) == ["page 2"]


def test_a_range_over_two_mappings_is_looked_at_in_both() -> None:
    with MappedMemory(pages=4) as memory:
        memory.unmap(2)
        spans = {"all": (memory.address + PAGE, memory.address + 3 * PAGE)}
        assert any_in(list(spans.values()))
        assert list(why_not_usable(spans, writing=False)) == ["all"]


def test_ordinary_memory_is_no_map(path: Path) -> None:
    own, mapped = torch.ones(5), copy_on_write(path)
    assert not any_in([span(own)])
    assert any_in(sorted([span(own), span(mapped)]))
    assert why_not_usable({"own": span(own)}, writing=True) == {}


def test_an_address_beyond_the_end_of_its_file_is_reported_with_the_file(path: Path) -> None:
    mapped, into = copy_on_write(path), mmap.mmap(-1, PAGE)
    os.truncate(path, 4096)
    target = torch.frombuffer(into, dtype=torch.uint8)
    with pytest.raises(host_reads.UnreadableMemory, match=f"it maps {path}, which ends before that"):
        host_reads.read([(mapped.data_ptr() + 8192, 16)], target.data_ptr())
