"""The CUDA driver, by ctypes: what torch does not tell of memory, and what must not wait for an allocation.

Handles by which another process opens memory, copies between raw addresses, kernels, streams, contexts.
torch stays in charge of devices, contexts and streams: nothing here creates a context, and an address is only ever one
that torch, or somebody else in this process, allocated. Names and numbers are those of the CUDA driver API.
"""

import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from tensorfork.errors import TransportUnavailable

HANDLE_BYTES = 64
"""Bytes of a CUDA IPC handle."""

_LAZY_PEER_ACCESS = 1

NON_BLOCKING = 1

_RELAXED = 2

_IN_STREAM_ORDER = 1

_INVALID_VALUE, _NOT_SUPPORTED = 1, 801


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@cache
def driver() -> ctypes.CDLL:
    """The driver's library. Raises `TransportUnavailable` where there is none."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportUnavailable(f"there is no NVIDIA driver here ({error}); this needs one") from error
    found.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    found.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
    found.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), ctypes.c_uint64]
    found.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    found.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    found.cuPointerGetAttributes.argtypes = [ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    found.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    found.cuModuleGetFunction.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    found.cuMemsetD8Async.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
    found.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
    batch = [*[ctypes.c_void_p] * 3, ctypes.c_size_t, *[ctypes.c_void_p] * 2, ctypes.c_size_t]
    for name, more in {"cuMemcpyBatchAsync": 1, "cuMemcpyBatchAsync_v2": 0}.items():  # from 12.8 on, and from 13.0
        if hasattr(found, name):
            getattr(found, name).argtypes = [*batch, *[ctypes.c_void_p] * more, ctypes.c_void_p]
    return found


class DriverError(Exception):
    """A call of the driver failed."""


def check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        raise DriverError(f"{what}: {(name.value or b'unknown error').decode()} ({code})")


def export_ipc_handle(address: int, device: int) -> bytes:
    """A handle by which another process of this host can open the block that begins there."""
    handle = _Handle()
    with current_context(device), relaxed_capture():
        check(driver().cuIpcGetMemHandle(ctypes.byref(handle), address), "cuIpcGetMemHandle")
    return bytes(handle)


def open_ipc_handle(handle: bytes) -> int:
    """The address, for the GPU that is `current_context`, of another process's block. Raises `DriverError`."""
    address = ctypes.c_uint64()
    opened = driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
    check(opened, "cuIpcOpenMemHandle")
    return address.value


def close_ipc_handle(address: int) -> None:
    """Let go of what `open_ipc_handle` gave for the GPU that is `current_context`. Nothing may be reading it any more."""
    check(driver().cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle")


def copy_one_by_one(stream: "torch.cuda.Stream", copies: Iterable[tuple[int, int, int]]) -> None:
    """Enqueue copies of (to, from, bytes) between addresses on a stream; about 2 µs each. Raises `DriverError`."""
    memcpy, handle = driver().cuMemcpyAsync, ctypes.c_void_p(stream.cuda_stream)
    with current_context(stream.device.index):
        for to, source, nbytes in copies:
            code = memcpy(to, source, nbytes, handle)
            if code:
                check(code, "cuMemcpyAsync")


class _Order(ctypes.Structure):
    """CUmemcpyAttributes: from when on a source may be read, and hints where it is."""

    _fields_ = [
        ("source_access", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("destination_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


def copy_batch(stream: "torch.cuda.Stream", copies: Sequence[tuple[int, int, int]]) -> None:
    """Enqueue copies of (to, from, bytes) between addresses on a stream, in any order among themselves.

    Where the driver has one call for all of them, its copy engines go from one to the next without a pause: 396 instead
    of 366 GB/s for stretches of 20 MB between two H200. Raises `DriverError`.
    """
    copies = [copy for copy in copies if copy[2]]  # the call takes none of no bytes
    batch, failed = _batch()
    if batch is None or len(copies) < 2:
        copy_one_by_one(stream, copies)
        return
    numbers = ctypes.c_uint64 * len(copies)
    to, sources, sizes = (numbers(*column) for column in zip(*copies, strict=True))
    order, from_first = _Order(_IN_STREAM_ORDER), ctypes.c_size_t(0)
    orders = ctypes.byref(order), ctypes.byref(from_first), 1
    with current_context(stream.device.index), relaxed_capture():
        code = batch(to, sources, sizes, len(copies), *orders, *failed, stream.cuda_stream)
    if code in (_INVALID_VALUE, _NOT_SUPPORTED):  # of this memory, or by this driver; it says better what it is
        copy_one_by_one(stream, copies)
        return
    check(code, "cuMemcpyBatchAsync")


@cache
def _batch() -> tuple[Any, Sequence[Any]]:
    """The driver's call for many copies at once, or None, and what it takes beyond that of 13.0."""
    if hasattr(driver(), "cuMemcpyBatchAsync_v2"):
        return driver().cuMemcpyBatchAsync_v2, ()
    return getattr(driver(), "cuMemcpyBatchAsync", None), (ctypes.byref(ctypes.c_size_t()),)


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Inside, this thread's calls do not break a graph that another thread is capturing."""
    mode = ctypes.c_int(_RELAXED)
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def relax_capture() -> None:
    """For the rest of its life, this thread breaks no graph that another captures. Nothing while no GPU is in use."""
    if torch.cuda.is_initialized():
        mode = ctypes.c_int(_RELAXED)
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def device_index(device: str) -> int:
    """The ordinal in ``cuda:1``."""
    return int(device.removeprefix("cuda:"))


def device_uuid(device: str) -> str:
    """The GPU's identity, the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid)


_contexts: dict[int, ctypes.c_void_p] = {}

_contexts_lock = threading.Lock()


@contextmanager
def current_context(device: int) -> Iterator[None]:
    """The device's primary context, which torch uses too, as this thread's current one."""
    with _contexts_lock:
        if device not in _contexts:
            torch.cuda.init()
            context, handle = ctypes.c_void_p(), ctypes.c_int()
            check(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
            check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
            _contexts[device] = context
    check(driver().cuCtxPushCurrent_v2(_contexts[device]), "cuCtxPushCurrent")
    try:
        yield
    finally:
        driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
