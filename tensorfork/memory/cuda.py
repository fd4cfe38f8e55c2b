"""The CUDA driver, by ctypes, for what torch does not offer.

IPC handles by which another process opens memory, copies between raw addresses that allocate nothing, contexts, stream
capture. torch stays in charge of devices and memory: nothing here creates a context of its own or allocates device
memory. Names and numbers are those of the CUDA driver API.
"""

import ctypes
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from tensorfork.errors import TransportUnavailable

HANDLE_BYTES = 64
"""Bytes of a CUDA IPC handle."""

STREAM_NON_BLOCKING = 1

_IPC_LAZY_PEER_ACCESS = 1
_CAPTURE_RELAXED = 2
_PORTABLE = 1
_TO_HOST, _TO_DEVICE, _WITHIN_GPUS = "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoDAsync_v2"


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@cache
def driver() -> ctypes.CDLL:
    """The driver's library. Raises `TransportUnavailable` if this machine has none."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportUnavailable(f"there is no NVIDIA driver here ({error}); this needs one") from error
    for name in (_TO_HOST, _TO_DEVICE, _WITHIN_GPUS):
        getattr(found, name).argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    found.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint]
    found.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_IpcHandle), ctypes.c_uint64]
    found.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
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


@cache
def driver_without_switching() -> ctypes.PyDLL:
    """The same library, for calls of a microsecond or two that are made by the hundred.

    These keep the interpreter. Where other threads want it, `driver` gives it away with each call, and has to wait for
    it to come back: five milliseconds at worst.
    """
    driver()  # which raises where there is none
    found = ctypes.PyDLL("libcuda.so.1")
    found.cuPointerGetAttributes.argtypes = [ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    return found


class DriverError(Exception):
    """A call of the driver failed."""


def raise_on_error(code: int, call: str) -> None:
    """Raise `DriverError` if the driver's call returned an error code."""
    if code:
        name = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(name))
        raise DriverError(f"{call}: {(name.value or b'unknown error').decode()} ({code})")


def export_ipc_handle(address: int, device: int) -> bytes:
    """A handle by which another process of this host can open the allocation that begins at an address.

    Raises `DriverError`.
    """
    handle = _IpcHandle()
    with current_context(device), relaxed_capture():
        raise_on_error(driver().cuIpcGetMemHandle(ctypes.byref(handle), address), "cuIpcGetMemHandle")
    return bytes(handle)


def open_ipc_handle(handle: bytes) -> int:
    """Open another process's allocation in the current context (see `current_context`), and return its address there.

    Raises `DriverError`.
    """
    address = ctypes.c_uint64()
    opened = driver().cuIpcOpenMemHandle_v2(
        ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), _IPC_LAZY_PEER_ACCESS
    )
    raise_on_error(opened, "cuIpcOpenMemHandle")
    return address.value


def close_ipc_handle(address: int) -> None:
    """Close what `open_ipc_handle` opened in the current context. Nothing may still be reading it."""
    raise_on_error(driver().cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle")


def pin(address: int, nbytes: int, device: int) -> None:
    """Page-lock host memory, for copies from and to every GPU, until the process ends. Raises `DriverError`."""
    with current_context(device), relaxed_capture():
        raise_on_error(driver().cuMemHostRegister_v2(address, nbytes, _PORTABLE), "cuMemHostRegister")


# The calls that copy name the direction. cuMemcpyAsync does not: it takes an address that is not mapped on a GPU for
# host memory, and reads or writes it on the CPU, which ends the process. These refuse it.


def copy_to_host(stream: "torch.cuda.Stream", copies: Iterable[tuple[int, int, int]]) -> None:
    """Enqueue copies of (to, from, bytes) from GPU memory to pinned host memory on a stream; about 2 µs each.

    Raises `DriverError` for an address that is not GPU memory, or not any more. The copies before it are enqueued then.
    """
    _enqueue_each(_TO_HOST, stream, copies)


def copy_to_device(stream: "torch.cuda.Stream", copies: Iterable[tuple[int, int, int]]) -> None:
    """The same from pinned host memory to GPU memory."""
    _enqueue_each(_TO_DEVICE, stream, copies)


def copy_one_by_one(stream: "torch.cuda.Stream", copies: Iterable[tuple[int, int, int]]) -> None:
    """The same between addresses on GPUs: of this process, or opened with an IPC handle."""
    _enqueue_each(_WITHIN_GPUS, stream, copies)


def _enqueue_each(call: str, stream: "torch.cuda.Stream", copies: Iterable[tuple[int, int, int]]) -> None:
    memcpy, handle = getattr(driver(), call), ctypes.c_void_p(stream.cuda_stream)
    with current_context(stream.device.index):
        for to, source, nbytes in copies:
            code = memcpy(to, source, nbytes, handle)
            if code:
                raise_on_error(code, call.removesuffix("_v2"))


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Inside, this thread's calls do not invalidate a CUDA graph that another thread is capturing."""
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def relax_capture() -> None:
    """The same for the rest of this thread's life. Does nothing while torch uses no GPU."""
    if torch.cuda.is_initialized():
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def device_index(device: str) -> int:
    """The device's ordinal in this process: 1 for ``cuda:1``."""
    return int(device.removeprefix("cuda:"))


def device_uuid(device: str) -> str:
    """The GPU's UUID, which is the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    return str(torch.cuda.get_device_properties(device).uuid)


_contexts: dict[int, ctypes.c_void_p] = {}

_contexts_lock = threading.Lock()


@contextmanager
def current_context(device: int) -> Iterator[None]:
    """Inside, the device's primary context, which torch uses too, is this thread's current one."""
    with _contexts_lock:
        if device not in _contexts:
            torch.cuda.init()
            context, handle = ctypes.c_void_p(), ctypes.c_int()
            raise_on_error(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
            raise_on_error(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
            _contexts[device] = context
    raise_on_error(driver().cuCtxPushCurrent_v2(_contexts[device]), "cuCtxPushCurrent")
    try:
        yield
    finally:
        driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
