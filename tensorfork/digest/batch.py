"""The digests of many tensors, such as a whole model's; on NVIDIA GPUs with one kernel launch for all of them.

With torch alone (`torch_digests`), memory is read once for each family of sums, in many launches, and CUDA loads each
of torch's kernels at its first use, which takes 20 ms and more. Our own kernel (`kernels/digest.cu`) reads memory once,
in one launch for the pieces of all tensors; the roots over them are computed on the host. Tensors that it does not
support (with gaps between elements, at addresses that are not multiples of 8, on other devices) are digested by
`torch_digests`.
"""

import ctypes
import time
import warnings
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

import torch
from attrs import define

from tensorfork.digest import kernels, torch_digests
from tensorfork.digest.definition import MASK, PIECE, Pieces, roots
from tensorfork.digest.elements import is_dense
from tensorfork.errors import TensorForkError
from tensorfork.memory import cuda, cuda_kernel

_THREADS = 512
"""Threads of a block, as in digest.cu."""
_ENTRY = 2
"""64-bit words of one entry in the kernel's table, which has an entry for each piece: `Piece` in digest.cu."""


class TensorMoved(TensorForkError):
    """A tensor was given other memory after its digest was prepared."""


@define(eq=False, repr=False)
class DigestBatch:
    """The digests of some tensors, to be computed once their bytes are there, and again after these have changed.

    Making it prepares what needs no bytes: which tensors are ties, and the tables of pieces. GPUs do nothing yet.
    """

    _names: list[list[str]]
    """The names of each tensor, by its number; several where it is tied."""
    _by_torch: dict[int, torch.Tensor]
    """By number, the tensors that `torch_digests` digests."""
    _by_kernel: dict[torch.device, dict[int, torch.Tensor]]
    """By device and number, the tensors that the kernel digests."""
    _places: dict[int, tuple[int, int]]
    """The addresses of the kernel's tensors when this was made, and how many pieces each has."""
    _tables: dict[torch.device, "array[int]"]
    """The kernel's tables of pieces, those of each device's tensors in the order of `_by_kernel`."""
    _piece: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], piece: int = PIECE) -> "DigestBatch":
        """Prepare the digests of these tensors. `piece` stands for PIECE, in tests."""
        known: dict[int, int] = {}
        places: dict[int, tuple[int, int]] = {}
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
            if _for_kernel(tensor):
                device, address, nbytes = tensor.device, tensor.data_ptr(), tensor.nbytes
                places[number] = address, -(-nbytes // piece)
                by_kernel[device][number] = tensor
                for start in range(0, nbytes, piece):
                    tables[device].extend((address + start, min(piece, nbytes - start)))
            else:
                by_torch[number] = tensor
        return cls(names, by_torch, dict(by_kernel), places, dict(tables), piece)

    def compute(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        gentle: bool = False,
        checked_reads: bool = False,
    ) -> dict[str, int]:
        """Each tensor's digest by name, as an unsigned 64-bit integer; nothing once `cancelled` returns true.

        See `pieces`, of which it is the roots.
        """
        return roots(self.pieces(cancelled, gentle=gentle, checked_reads=checked_reads))

    def pieces(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        gentle: bool = False,
        checked_reads: bool = False,
    ) -> dict[str, Pieces]:
        """The digests of each tensor's pieces by name; nothing once `cancelled` returns true.

        Takes at most 16 MiB of scratch on each device. Work is enqueued on the current stream of each; the values are
        on the host when this returns.

        Args:
            cancelled: asked between groups of tensors, and every 8 MiB of long ones.
            gentle: use a quarter of a GPU's multiprocessors at most, and leave the others to other work.
            checked_reads: copy what is on the CPU by the kernel before it is summed (`host_reads`), so that memory
                that is freed or unmapped meanwhile is an error, and not the end of the process.

        Raises:
            TensorMoved: a GPU tensor's data pointer has changed since this was made.
            UnreadableMemory: with `checked_reads`: memory of a tensor is not mapped any more.
        """
        found: dict[int, Pieces] = {}
        by_torch = dict(self._by_torch)
        for device, table in self._tables.items():
            if cancelled():
                return {}
            self._check_addresses(device)
            if kernel_ready(device):
                found.update(self._split(device, _run_kernel(device, table, gentle)))
            else:
                by_torch.update(self._by_kernel[device])
        numbered = {str(number): tensor for number, tensor in by_torch.items()}
        rest = torch_digests.compute(numbered, cancelled, checked_reads=checked_reads, piece=self._piece)
        if len(rest) < len(by_torch):
            return {}
        found.update((int(number), pieces) for number, pieces in rest.items())
        return {name: found[i] for i, names in enumerate(self._names) for name in names}

    def _check_addresses(self, device: torch.device) -> None:
        for number, tensor in self._by_kernel[device].items():
            if tensor.data_ptr() != self._places[number][0]:
                raise TensorMoved(
                    f"{self._names[number][0]} was given other memory; what is published is changed in place, or "
                    "published again"
                )

    def _split(self, device: torch.device, values: Sequence[int]) -> Iterator[tuple[int, Pieces]]:
        """The pieces of each of a device's tensors, by its number, of those of all entries in its table."""
        start = 0
        for number in self._by_kernel[device]:
            end = start + self._places[number][1]
            yield number, tuple(values[start:end])
            start = end


def _for_kernel(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and is_dense(tensor) and bool(tensor.nbytes) and not tensor.data_ptr() % 8


def _run_kernel(device: torch.device, table: "array[int]", gentle: bool) -> list[int]:
    """The digest of each entry's piece in the table."""
    with torch.inference_mode(), torch.cuda.device(device):
        pieces = torch.frombuffer(table, dtype=torch.int64).to(device)
        entries = len(table) // _ENTRY
        found = torch.empty(entries, dtype=torch.int64, device=device)
        most_blocks = torch.cuda.get_device_properties(device).multi_processor_count // 4 if gentle else entries
        _kernel().launch(
            torch.cuda.current_stream(device),
            min(entries, most_blocks),
            _THREADS,
            ctypes.c_uint64(pieces.data_ptr()),
            ctypes.c_uint32(entries),
            ctypes.c_uint64(found.data_ptr()),
            ctypes.c_uint64(0),
        )
        return [value & MASK for value in found.tolist()]


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
