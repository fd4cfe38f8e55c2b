"""GPU memory that can be unmapped and mapped anew at its address: what engines that sleep, and torch's
``expandable_segments``, do. By the driver's calls for virtual memory; needs a GPU.
"""

import ctypes
from types import TracebackType
from typing import Self

import torch

from tensorfork.memory import cuda
from tensorfork.memory.raw import bytes_at

_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def _call(name: str, *arguments: object) -> None:
    call = getattr(cuda.driver(), name)
    call.argtypes = None
    cuda.raise_on_error(call(*arguments), name)


class VirtualMemory:
    """A range of addresses on a GPU, of pieces of equal size that are mapped one by one. All are mapped at first.

    Args:
        device: the GPU's ordinal.
        nbytes: of each piece, rounded up to what the driver maps.
        pieces: how many.
    """

    def __init__(self, device: int, nbytes: int, pieces: int = 1) -> None:
        self._properties = _AllocationProperties(_PINNED, 0, _Location(_DEVICE, device))
        self._access = _Access(_Location(_DEVICE, device), _READ_WRITE)
        self.device = device
        granularity, address = ctypes.c_size_t(), ctypes.c_uint64()
        with cuda.current_context(device):
            _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0)
            self.piece = -(-nbytes // granularity.value) * granularity.value
            self.nbytes = self.piece * pieces
            _call("cuMemAddressReserve", ctypes.byref(address), *map(ctypes.c_uint64, (self.nbytes, 0, 0, 0)))
        self.address = address.value
        self._handles: dict[int, ctypes.c_uint64] = {}
        self.map()

    def map(self, *pieces: int) -> bool:
        """Map new memory, with undefined contents, at these pieces; by default, at all that have none. True: it is at
        the same addresses.
        """
        with cuda.current_context(self.device):
            for i in pieces or [i for i in range(self.nbytes // self.piece) if i not in self._handles]:
                handle, at = ctypes.c_uint64(), ctypes.c_uint64(self.address + i * self.piece)
                size = ctypes.c_size_t(self.piece)
                _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0))
                self._handles[i] = handle
                _call("cuMemMap", at, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
                _call("cuMemSetAccess", at, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        return True

    def unmap(self, *pieces: int) -> None:
        """Unmap these pieces, by default all, and give their memory back. The addresses stay reserved."""
        with cuda.current_context(self.device):
            for i in pieces or list(self._handles):
                handle = self._handles.pop(i)
                _call("cuMemUnmap", ctypes.c_uint64(self.address + i * self.piece), ctypes.c_size_t(self.piece))
                _call("cuMemRelease", handle)

    def tensor(self, start: int = 0, nbytes: int | None = None) -> torch.Tensor:
        """Bytes of it as a uint8 tensor, which does not own them."""
        size = self.nbytes - start if nbytes is None else nbytes
        return bytes_at(self.address + start, size, torch.device("cuda", self.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmap()
        with cuda.current_context(self.device):
            _call("cuMemAddressFree", ctypes.c_uint64(self.address), ctypes.c_size_t(self.nbytes))


class DriverMemory:
    """Allocations of `cuMemAlloc`, which is what torch's allocator takes its memory from, and other processes can open.

    Its methods are those of `VirtualMemory`; but where memory is mapped anew, the driver says.
    """

    def __init__(self, device: int, nbytes: int, pieces: int = 1) -> None:
        self.device, self.piece, self.nbytes = device, nbytes, nbytes * pieces
        self._addresses: list[int] = []
        self.map()

    def map(self) -> bool:
        """Allocate. Whether all is where it was before."""
        before, self._addresses = self._addresses, []
        with cuda.current_context(self.device):
            for _ in range(self.nbytes // self.piece):
                address = ctypes.c_uint64()
                _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(self.piece))
                self._addresses.append(address.value)
        self._mapped = True
        return self._addresses == before

    def unmap(self) -> None:
        """Free all."""
        if self._mapped:
            self._mapped = False
            with cuda.current_context(self.device):
                for address in self._addresses:
                    _call("cuMemFree_v2", ctypes.c_uint64(address))

    def tensor(self, piece: int, nbytes: int) -> torch.Tensor:
        """The first bytes of a piece as a uint8 tensor, which does not own them."""
        return bytes_at(self._addresses[piece], nbytes, torch.device("cuda", self.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmap()
