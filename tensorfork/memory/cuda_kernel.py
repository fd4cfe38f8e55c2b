"""CUDA kernels of our own: loading and launching them through the driver."""

import ctypes
import threading
from collections.abc import Iterator, Mapping

import torch

from tensorfork.memory.cuda import current_context, driver, raise_on_error, relaxed_capture


class Kernel:
    """One kernel.

    Args:
        name: of the function in the code.
        cubins: machine code, by the compute capability it was compiled for, as in ``90`` for 9.0; it also runs on later
            ones of the same major number.
        ptx: for GPUs that no cubin is for: the driver compiles it, which takes a tenth of a second.
    """

    def __init__(self, name: str, cubins: Mapping[int, bytes], ptx: bytes) -> None:
        self._name, self._cubins, self._ptx = name, cubins, ptx
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._load_lock = threading.Lock()

    def load(self, device: int) -> ctypes.c_void_p:
        """Load it on a GPU, once. Raises `DriverError`."""
        with self._load_lock:
            if device not in self._functions:
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                with current_context(device), relaxed_capture():
                    for image in self._images(device):
                        if not (code := driver().cuModuleLoadData(ctypes.byref(module), image)):
                            break
                    raise_on_error(code, "cuModuleLoadData")
                    code = driver().cuModuleGetFunction(ctypes.byref(function), module, self._name.encode())
                    raise_on_error(code, "cuModuleGetFunction")
                self._functions[device] = function
            return self._functions[device]

    def _images(self, device: int) -> Iterator[bytes]:
        """The code to try on this GPU, best first."""
        major, minor = torch.cuda.get_device_capability(device)
        fitting = [built_for for built_for in self._cubins if built_for // 10 == major and built_for % 10 <= minor]
        if fitting:
            yield self._cubins[max(fitting)]
        yield self._ptx

    def launch(
        self, stream: "torch.cuda.Stream", blocks: int, threads: int, *arguments: "ctypes._SimpleCData[int]"
    ) -> None:
        """Enqueue it on a stream, with these arguments. Raises `DriverError`."""
        function = self.load(stream.device.index)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with current_context(stream.device.index):
            code = driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream.cuda_stream, pointers, None)
        raise_on_error(code, "cuLaunchKernel")
