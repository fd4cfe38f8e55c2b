"""Which pages of a file are in the operating system's page cache: whether reading it is warm or cold."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def resident(files: Iterable[Path]) -> float | None:
    """The share of these files' pages that are in the page cache, 0 to 1; None where the system does not tell."""
    pages = cached = 0
    for path in files:
        residency = _page_residency(path)
        if residency is None:
            return None
        pages += len(residency)
        cached += sum(byte & 1 for byte in residency)
    return cached / pages if pages else None


def drop(path: Path) -> None:
    """Write a file to the disk and ask the system to drop its pages; it may keep them (a tmpfs always does)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _page_residency(path: Path) -> bytes | None:
    """One byte for each page, whose lowest bit says whether it is cached (see mincore(2)); None where that fails."""
    nbytes = path.stat().st_size
    if not nbytes:
        return b""
    libc = ctypes.CDLL(None, use_errno=True)
    vector = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        try:
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), vector)
        finally:
            del first  # the mapping cannot be closed while a pointer into it exists
    return None if failed else vector.raw
