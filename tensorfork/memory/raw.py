"""Raw memory as tensors, through DLPack, the exchange protocol for arrays, and as memoryviews.

By ctypes: that works for CPU and CUDA alike, and needs no numpy.
"""

import ctypes
from typing import Any

import torch
import torch.utils.dlpack

from tensorfork.regions import Region

_CPU, _CUDA = 1, 2

_UINT = 1


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_exported: dict[int, Any] = {}
"""By address, the structures that torch still refers to."""


def _delete(address: int) -> None:
    _exported.pop(address, None)


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)

for _kept in (_deleter, _exported):  # torch may call the deleter after Python has torn this module down
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))

_new_capsule = ctypes.pythonapi.PyCapsule_New

_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory of this process as a uint8 tensor [nbytes]. The tensor does not own it; the caller keeps it alive."""
    shape = (ctypes.c_int64 * 1)(nbytes)
    managed = _DLManagedTensor()
    managed.tensor.data = address
    managed.tensor.device_type = _CPU if device.type == "cpu" else _CUDA
    managed.tensor.device_id = device.index or 0
    managed.tensor.ndim, managed.tensor.code, managed.tensor.bits, managed.tensor.lanes = 1, _UINT, 8, 1
    managed.tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    at = ctypes.addressof(managed)
    _exported[at] = managed, shape
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(_new_capsule(at, b"dltensor", None))
    return tensor


def region_bytes(region: Region) -> torch.Tensor:
    """A region as a uint8 tensor [nbytes] that does not own it."""
    return bytes_at(region.address, region.nbytes, torch.device(region.device))


_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory

_from_memory.argtypes = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int

_from_memory.restype = ctypes.py_object

_WRITABLE = 0x200


def view_at(address: int, nbytes: int) -> memoryview:
    """A range of host memory, which the caller keeps alive for as long as the view is used.

    Views are made when they are needed. Making one of each of 20,000 regions for each lease was tried: Python's garbage
    collector then stops the seed for a tenth of a second.
    """
    view: memoryview = _from_memory(address, nbytes, _WRITABLE)
    return view
