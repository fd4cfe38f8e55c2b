"""Host memory in huge pages, where the kernel has them: into those, `host_reads` is faster."""

import ctypes
import mmap

import torch

_HUGE_PAGE = 2 << 20


def empty(nbytes: int) -> torch.Tensor:
    """Memory as a uint8 tensor [nbytes], allocated by torch, aligned to a huge page. Up to 4 MiB more are set aside."""
    whole = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    allocated = torch.empty(whole + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -allocated.data_ptr() % _HUGE_PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and hasattr(mmap, "MADV_HUGEPAGE"):
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(allocated.data_ptr() + start, whole, mmap.MADV_HUGEPAGE)  # a kernel without them refuses: as good
    return allocated.narrow(0, start, nbytes)
