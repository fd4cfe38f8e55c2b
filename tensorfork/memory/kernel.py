"""A CUDA kernel of our own: loaded through the driver, and launched."""

import ctypes
import threading
from collections.abc import Iterator, Mapping

import torch

from tensorfork.memory.cuda import check, current_context, driver, relaxed_capture


class Kernel:
    """A kernel of our own.

    Args:
        name: the kernel's.
        cubins: machine code, by the compute capability it was made for, as in ``90`` for 9.0; it also runs on later
            ones of the same major number.
        ptx: for GPUs that none of it fits: the driver makes machine code of it, which takes a tenth of a second.
    """

    def __init__(self, name: str, cubins: Mapping[int, bytes], ptx: bytes) -> None:
        self._name, self._cubins, self._ptx = name, cubins, ptx
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._loading = threading.Lock()

    def load(self, device: int) -> ctypes.c_void_p:
        """Have it ready on a GPU. Raises `DriverError` where it cannot be."""
        with self._loading:
            if device not in self._functions:
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                with current_context(device), relaxed_capture():
                    for image in self._images(device):
                        if not (code := driver().cuModuleLoadData(ctypes.byref(module), image)):
                            break
                    check(code, "cuModuleLoadData")
                    found = driver().cuModuleGetFunction(ctypes.byref(function), module, self._name.encode())
                    check(found, "cuModuleGetFunction")
                self._functions[device] = function
            return self._functions[device]

    def _images(self, device: int) -> Iterator[bytes]:
        major, minor = torch.cuda.get_device_capability(device)
        fitting = [made for made in self._cubins if made // 10 == major and made % 10 <= minor]
        if fitting:
            yield self._cubins[max(fitting)]
        yield self._ptx

    def launch(
        self, stream: "torch.cuda.Stream", blocks: int, threads: int, *values: "ctypes._SimpleCData[int]"
    ) -> None:
        """Enqueue it, so many blocks of so many threads, with these arguments."""
        function = self.load(stream.device.index)
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        with current_context(stream.device.index):
            code = driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream.cuda_stream, places, None)
        check(code, "cuLaunchKernel")


def fill_zeros(tensor: torch.Tensor, stream: "torch.cuda.Stream") -> None:
    """Enqueue zeros for a dense tensor, without a kernel."""
    with current_context(stream.device.index):
        code = driver().cuMemsetD8Async(tensor.data_ptr(), 0, tensor.nbytes, stream.cuda_stream)
    check(code, "cuMemsetD8Async")
