"""Host memory that is read through the kernel: a bad address is an error, not the end of the process."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorfork.memory import host_reads
from tensorfork.memory.host_reads import UnreadableMemory, read

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture(params=["process_vm_writev", "pwrite"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read: a container may forbid the first."""
    if request.param == "pwrite":
        monkeypatch.setattr(host_reads, "_process_vm_writev", lambda *_: -1)
    return str(request.param)


@pytest.fixture
def pages() -> Iterator[tuple[int, bytes]]:
    """The address of three pages, of which the last is not mapped, and the bytes of the first two."""
    address = libc.mmap(None, 3 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    content = os.urandom(2 * PAGE)
    ctypes.memmove(address, content, len(content))
    libc.munmap(address + 2 * PAGE, PAGE)
    yield address, content
    libc.munmap(address, 2 * PAGE)


def test_spans_arrive_one_after_another(way: str, pages: tuple[int, bytes]) -> None:
    address, content = pages
    buffer = ctypes.create_string_buffer(b"x" * 40, 40)
    read([(address + 3, 7), (address + 100, 0), (address + PAGE - 5, 10)], ctypes.addressof(buffer) + 4)
    assert buffer.raw == b"xxxx" + content[3:10] + content[PAGE - 5 : PAGE + 5] + b"x" * 19


def test_more_spans_than_one_system_call_takes_and_more_bytes_than_one_chunk(way: str) -> None:
    source = os.urandom((2 << 20) + 77)
    start = ctypes.create_string_buffer(source, len(source))
    target = ctypes.create_string_buffer(len(source))
    address, step = ctypes.addressof(start), 997
    read([(address + i, min(step, len(source) - i)) for i in range(0, len(source), step)], ctypes.addressof(target))
    assert target.raw == source
    target = ctypes.create_string_buffer(len(source))
    read([(address, len(source))], ctypes.addressof(target))
    assert target.raw == source


@pytest.mark.parametrize("start", [0, PAGE, 2 * PAGE, 2 * PAGE - 1])
def test_memory_that_is_not_mapped_is_an_error(way: str, pages: tuple[int, bytes], start: int) -> None:
    address, _ = pages
    buffer = ctypes.create_string_buffer(3 * PAGE)
    with pytest.raises(UnreadableMemory, match="is not mapped"):
        read([(address + start, 3 * PAGE - start)], ctypes.addressof(buffer))


def test_a_file_that_was_truncated_under_its_mapping_is_an_error(way: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * 2 * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        file.truncate(PAGE)
        buffer = ctypes.create_string_buffer(2 * PAGE)
        read([(address, PAGE)], ctypes.addressof(buffer))
        with pytest.raises(UnreadableMemory):
            read([(address, 2 * PAGE)], ctypes.addressof(buffer))
