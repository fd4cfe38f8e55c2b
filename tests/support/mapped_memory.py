"""Host memory that a test can unmap, as an engine may that offloads or reloads its weights."""

import ctypes
import mmap
from types import TracebackType
from typing import Self

import torch

from tensorfork.memory.raw import bytes_at

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE, _MAP_FIXED = 0, 0x10


class MappedMemory:
    """Whole pages of random bytes, the same for the same seed.

    Unmapped, the addresses stay reserved: nothing else is mapped there until the end.

    Attributes:
        tensor: these bytes. It does not own them.
    """

    def __init__(self, pages: int, seed: int = 0) -> None:
        self.nbytes = pages * PAGE
        self.address = self._map(None, mmap.PROT_READ | mmap.PROT_WRITE, 0)
        self.tensor = bytes_at(self.address, self.nbytes, torch.device("cpu"))
        self.tensor.random_(generator=torch.Generator().manual_seed(seed))

    def unmap(self, start: int = 0) -> None:
        """Unmap the pages from this one on."""
        self._map(self.address + start * PAGE, _PROT_NONE, _MAP_FIXED, self.nbytes - start * PAGE)

    def _map(self, address: int | None, protection: int, flags: int, nbytes: int | None = None) -> int:
        flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mapped = _libc.mmap(address, nbytes or self.nbytes, protection, flags, -1, 0)
        assert mapped != ctypes.c_void_p(-1).value, "mmap failed"
        return int(mapped)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _libc.munmap(self.address, self.nbytes)
