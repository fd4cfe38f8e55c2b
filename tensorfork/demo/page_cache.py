"""What the operating system keeps of a file in memory; by its answer a reading time is called warm or cold."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def resident(files: Iterable[Path]) -> float | None:
    """The share of these files' pages that lie in memory, 0 to 1; None where the system does not say."""
    pages = held = 0
    for path in files:
        found = _pages(path)
        if found is None:
            return None
        pages += len(found)
        held += sum(byte & 1 for byte in found)
    return held / pages if pages else None


def drop(path: Path) -> None:
    """Ask the system to forget a file's pages, once they are on the disk; it may not (a tmpfs cannot)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pages(path: Path) -> bytes | None:
    """One byte for each page; see mincore(2)."""
    nbytes = path.stat().st_size
    if not nbytes:
        return b""
    libc = ctypes.CDLL(None, use_errno=True)
    found = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        try:
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), found)
        finally:
            del first  # the mapping cannot be closed while it is looked at
    return None if failed else found.raw
