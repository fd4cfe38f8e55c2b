"""The digests of a whole model, by name: those of `digest`, on NVIDIA GPUs by one kernel for all tensors at once.

torch reads memory once for each family of sums, launch by launch, and CUDA loads each of its kernels at its first use,
for 20 ms and more; a kernel of our own (`kernels/digest.cu`) reads once, all tensors in one launch. What it does not
take (gaps between elements, odd addresses, other devices) goes the general way.
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
from tensorfork.memory import cuda, kernel

_THREADS = 512
"""Of a block, as in digest.cu."""
_ENTRY = 3
"""64-bit words of a segment's entry in the kernel's table."""


@define
class DigestBatch:
    """The digests of some tensors, to be computed when their bytes are there (and again when those have changed).

    What can be prepared without reading a byte is prepared when this is made: which tensors are ties, and the tables of
    segments. Nothing is done on any GPU.
    """

    _names: list[list[str]]
    """Of each tensor; several, where it is tied."""
    _general: dict[int, torch.Tensor]
    _tables: dict[torch.device, "array[int]"]
    _by_kernel: dict[torch.device, dict[int, torch.Tensor]]
    _addresses: dict[int, int]
    """Of the tensors that are the kernel's."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "DigestBatch":
        """For all these tensors."""
        known: dict[int, int] = {}
        addresses: dict[int, int] = {}
        names: list[list[str]] = []
        general: dict[int, torch.Tensor] = {}
        tables: dict[torch.device, array[int]] = defaultdict(lambda: array("Q"))
        by_kernel: dict[torch.device, dict[int, torch.Tensor]] = defaultdict(dict)
        for i, (name, tensor) in enumerate(tensors.items()):
            if not i % 64:
                time.sleep(0)  # a seed's engine wants the interpreter too, and sooner than it would be taken away
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
                general[number] = tensor
        return cls(names, general, dict(tables), dict(by_kernel), addresses)

    def compute(self, cancelled: Callable[[], bool] = lambda: False, *, gentle: bool = False) -> dict[str, int]:
        """Each digest by name, as an unsigned 64-bit integer; nothing once `cancelled()`.

        `gentle` takes a quarter of a GPU's multiprocessors, and leaves the rest to who computes there. At most 16 MiB
        of scratch on each device. Work goes to the current stream of each; the values are on the host when this
        returns.
        """
        values: dict[int, int] = {}
        general = dict(self._general)
        for device, table in self._tables.items():
            if cancelled():
                return {}
            for number, tensor in self._by_kernel[device].items():
                if tensor.data_ptr() != self._addresses[number]:
                    raise RuntimeError(
                        f"{self._names[number][0]} was given other memory; what is published is changed in place, or "
                        "published again"
                    )
            if kernel_ready(device):
                found = _run(device, table, len(self._names), gentle)
                values.update((number, found[number]) for number in self._by_kernel[device])
            else:
                general.update(self._by_kernel[device])
        rest = definition.digests({str(number): tensor for number, tensor in general.items()}, cancelled)
        if len(rest) < len(general):
            return {}
        values.update((int(number), value) for number, value in rest.items())
        return {name: values[i] % (1 << 64) for i, names in enumerate(self._names) for name in names}


def _run(device: torch.device, table: "array[int]", count: int, gentle: bool) -> Sequence[int]:
    """The kernel's sums, by the number of the tensor."""
    with torch.inference_mode(), torch.cuda.device(device):
        segments = torch.frombuffer(table, dtype=torch.int64).to(device)
        found = torch.empty(count, dtype=torch.int64, device=device)
        stream = torch.cuda.current_stream(device)
        kernel.fill_zeros(found, stream)
        entries = len(table) // _ENTRY
        most = torch.cuda.get_device_properties(device).multi_processor_count // 4 if gentle else entries
        _kernel().launch(
            stream,
            min(entries, most),
            _THREADS,
            ctypes.c_uint64(segments.data_ptr()),
            ctypes.c_uint32(entries),
            ctypes.c_uint64(found.data_ptr()),
            ctypes.c_uint64(0),
        )
        values: list[int] = found.tolist()
        return values


@cache
def _kernel() -> kernel.Kernel:
    made = {path.name: path.read_bytes() for path in files(kernels).iterdir() if path.name.startswith("digest.")}
    cubins = {int(name.split(".")[1].removeprefix("sm_")): made[name] for name in made if name.endswith(".cubin")}
    return kernel.Kernel("digest", cubins, made["digest.ptx"] + b"\0")


@cache
def kernel_ready(device: torch.device) -> bool:
    """Whether the kernel runs on this GPU."""
    if torch.version.cuda is None:
        return False
    try:
        _kernel().load(device.index)
    except (cuda.DriverError, TensorForkError) as error:
        warnings.warn(f"digests on {device} fall back on torch, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True
