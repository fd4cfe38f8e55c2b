"""The digests of many tensors, such as a whole model's; on NVIDIA GPUs with one kernel launch for all of them.

With torch alone (`definition`), memory is read once for each family of sums, in many launches, and CUDA loads each of
torch's kernels at its first use, which takes 20 ms and more. Our own kernel (`kernels/digest.cu`) reads memory once, in
one launch for all tensors. Tensors that it does not support (with gaps between elements, at addresses that are not
multiples of 8, on other devices) are digested by `definition`.
"""

import ctypes
import time
import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files

import torch
from attrs import define

from tensorfork.digest import definition, kernels
from tensorfork.digest.definition import SEGMENT
from tensorfork.digest.elements import is_dense
from tensorfork.errors import TensorForkError
from tensorfork.memory import cuda, cuda_kernel

_THREADS = 512
"""Threads of a block, as in digest.cu."""
_ENTRY = 3
"""64-bit words of one entry in the kernel's table, which has an entry for each segment: `Segment` in digest.cu."""


class TensorMoved(TensorForkError):
    """A tensor was given other memory after its digest was prepared."""


@define(eq=False, repr=False)
class DigestBatch:
    """The digests of some tensors, to be computed once their bytes are there, and again after these have changed.

    Making it prepares what needs no bytes: which tensors are ties, and the tables of segments. GPUs do nothing yet.
    """

    _names: list[list[str]]
    """The names of each tensor, by its number; several where it is tied."""
    _by_torch: dict[int, torch.Tensor]
    """By number, the tensors that `definition` digests."""
    _by_kernel: dict[torch.device, dict[int, torch.Tensor]]
    """By device and number, the tensors that the kernel digests."""
    _addresses: dict[int, int]
    """The addresses of the kernel's tensors when this was made."""
    _tables: dict[torch.device, "array[int]"]
    """The kernel's tables of segments."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "DigestBatch":
        """Prepare the digests of these tensors."""
        known: dict[int, int] = {}
        addresses: dict[int, int] = {}
        names: list[list[str]] = []
        by_torch: dict[int, torch.Tensor] = {}
        tables: dict[torch.device, array[int]] = defaultdict(lambda: array("Q"))
        by_kernel: dict[torch.device, dict[int, torch.Tensor]] = defaultdict(dict)
        for i, (name, tensor) in enumerate(tensors.items()):
            if not i % 64:
                time.sleep(0)  # let a seed's engine run: the interpreter would switch to its thread only later
            number = known.setdefault(id(tensor), len(names))
            if number < len(names):
                names[number].append(name)
                continue
            names.append([name])
            if tensor.is_cuda and is_dense(tensor) and (nbytes := tensor.nbytes) and not tensor.data_ptr() % 8:
                device, address = tensor.device, tensor.data_ptr()
                addresses[number] = address
                by_kernel[device][number] = tensor
                if nbytes <= SEGMENT:
                    tables[device].extend((address, nbytes | number << 32, 0))
                    continue
                for segment, start in enumerate(range(0, nbytes, SEGMENT)):
                    tables[device].extend((address + start, min(SEGMENT, nbytes - start) | number << 32, segment))
            else:
                by_torch[number] = tensor
        return cls(names, by_torch, dict(by_kernel), addresses, dict(tables))

    def compute(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        gentle: bool = False,
        checked_reads: bool = False,
    ) -> dict[str, int]:
        """Each digest by name, as an unsigned 64-bit integer; nothing once `cancelled` returns true.

        Takes at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each; the values are
        on the host when this returns.

        Args:
            cancelled: asked between groups of tensors, and every 8 MB of long ones.
            gentle: use a quarter of a GPU's multiprocessors at most, and leave the others to other work.
            checked_reads: copy what is on the CPU by the kernel before it is summed (`host_reads`), so that memory
                that is freed or unmapped meanwhile is an error, and not the end of the process.

        Raises:
            TensorMoved: a GPU tensor's data pointer has changed since this was made.
            UnreadableMemory: with `checked_reads`: memory of a tensor is not mapped any more.
        """
        values: dict[int, int] = {}
        by_torch = dict(self._by_torch)
        for device, table in self._tables.items():
            if cancelled():
                return {}
            for number, tensor in self._by_kernel[device].items():
                if tensor.data_ptr() != self._addresses[number]:
                    raise TensorMoved(
                        f"{self._names[number][0]} was given other memory; what is published is changed in place, or "
                        "published again"
                    )
            if kernel_ready(device):
                found = _run_kernel(device, table, len(self._names), gentle)
                values.update((number, found[number]) for number in self._by_kernel[device])
            else:
                by_torch.update(self._by_kernel[device])
        numbered = {str(number): tensor for number, tensor in by_torch.items()}
        rest = definition.digests(numbered, cancelled, checked_reads=checked_reads)
        if len(rest) < len(by_torch):
            return {}
        values.update((int(number), value) for number, value in rest.items())
        return {name: values[i] % (1 << 64) for i, names in enumerate(self._names) for name in names}


def _run_kernel(device: torch.device, table: "array[int]", count: int, gentle: bool) -> Sequence[int]:
    """The digests of the table's tensors, as signed integers, by the tensor's number. `count` is above all numbers."""
    with torch.inference_mode(), torch.cuda.device(device):
        segments = torch.frombuffer(table, dtype=torch.int64).to(device)
        found = torch.empty(count, dtype=torch.int64, device=device)
        stream = torch.cuda.current_stream(device)
        cuda_kernel.fill_zeros(found, stream)
        entries = len(table) // _ENTRY
        most_blocks = torch.cuda.get_device_properties(device).multi_processor_count // 4 if gentle else entries
        _kernel().launch(
            stream,
            min(entries, most_blocks),
            _THREADS,
            ctypes.c_uint64(segments.data_ptr()),
            ctypes.c_uint32(entries),
            ctypes.c_uint64(found.data_ptr()),
            ctypes.c_uint64(0),
        )
        values: list[int] = found.tolist()
        return values


@cache
def _kernel() -> cuda_kernel.Kernel:
    code = {path.name: path.read_bytes() for path in files(kernels).iterdir() if path.name.startswith("digest.")}
    cubins = {int(name.split(".")[1].removeprefix("sm_")): code[name] for name in code if name.endswith(".cubin")}
    return cuda_kernel.Kernel("digest", cubins, code["digest.ptx"] + b"\0")


@cache
def kernel_ready(device: torch.device) -> bool:
    """Whether the kernel can run on this GPU. Loads it; warns where it cannot."""
    if torch.version.cuda is None:
        return False
    try:
        _kernel().load(device.index)
    except (cuda.DriverError, TensorForkError) as error:
        warnings.warn(f"digests on {device} are computed slowly, by torch: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True
