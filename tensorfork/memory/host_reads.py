"""Reading this process's own host memory through the kernel, which reports a bad address instead of ending the process.

An engine may free, unmap or truncate what it published at any moment. A load from such an address is a SIGSEGV or a
SIGBUS, and ends the process. The system calls used here fail with EFAULT instead. Memory that was freed and mapped
anew is read like any other: whoever reads has to look at the tensors again afterwards.

`process_vm_writev` on oneself copies from what it takes for the caller's memory into what it takes for another
process's. Only for the latter does the kernel look up each page, and into a huge page that costs next to nothing: 12
GB/s on a core that copies 16 by memcpy, where `process_vm_readv`, which looks up the pages that are read, makes 7.8.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tensorfork.errors import TensorForkError
from tensorfork.memory.mapped_files import why_unreadable
from tensorfork.memory.raw import view_at

Span = tuple[int, int]
"""An address, and a number of bytes."""

MAX_SPANS = 1024
"""Spans of one system call: the kernel's UIO_MAXIOV."""
_CHUNK = 1 << 20
"""Bytes that pass through the file at a time."""


class UnreadableMemory(TensorForkError):
    """Memory that is not mapped, or not any more. The process goes on."""


def read(spans: Sequence[Span], into: int) -> None:
    """Copy spans of this process's host memory to the address `into`, one after another.

    The memory at `into` must be the caller's own. Raises `UnreadableMemory` if one of the spans is not mapped; what
    lies at `into` is then undefined.
    """
    for start in range(0, len(spans), MAX_SPANS):
        some = spans[start : start + MAX_SPANS]
        total = sum(nbytes for _, nbytes in some)
        if _read_by_process_vm(some, into) != total:
            # Refused by a container's seccomp; or not mapped, and then the other way says so.
            _read_by_file(some, into)
        into += total


def _read_by_process_vm(spans: Sequence[Span], into: int) -> int:
    """Bytes read: fewer than asked for where the call is refused, or meets memory that is not mapped."""
    total = sum(nbytes for _, nbytes in spans)
    if not total or _process_vm_writev is None:
        return 0
    source, target = struct.pack(f"@{2 * len(spans)}N", *chain.from_iterable(spans)), struct.pack("@2N", into, total)
    done = _process_vm_writev(os.getpid(), source, len(spans), target, 1, 0)
    return int(done)


def _read_by_file(spans: Sequence[Span], into: int) -> None:
    """Write the spans to a file in memory, and read that back."""
    file = _files.pop() if _files else _new_file()
    try:
        for address, nbytes in spans:
            end = address + nbytes
            while address < end:
                try:
                    written = os.pwrite(file, view_at(address, min(_CHUNK, end - address)), 0)
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    raise UnreadableMemory(
                        f"memory at {address:#x} is not mapped in this process any more{why_unreadable(address)}"
                    ) from error
                os.preadv(file, [view_at(into, written)], 0)
                address, into = address + written, into + written
    finally:
        _files.append(file)


_files: list[int] = []
"""Descriptors of files that no thread uses at the moment: as many as threads have read at once."""


def _new_file() -> int:
    return os.memfd_create("tensorfork", os.MFD_CLOEXEC)


def _find_process_vm_writev() -> "ctypes._NamedFuncPointer | None":
    try:
        found = ctypes.CDLL(None, use_errno=True).process_vm_writev
    except (OSError, AttributeError):
        return None
    found.restype = ctypes.c_ssize_t
    iovecs: list[Any] = [ctypes.c_char_p, ctypes.c_ulong] * 2  # each an array of struct iovec
    found.argtypes = [ctypes.c_int, *iovecs, ctypes.c_ulong]
    return found


_process_vm_writev = _find_process_vm_writev()
