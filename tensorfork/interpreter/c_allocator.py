"""The C library's allocator: having it keep freed memory.

Why: glibc maps each block of 128 KiB or more anew, and returns to the kernel what it has free beyond 128 KiB. The
kernel then clears every page of a receive buffer each time the buffer is allocated.
"""

import ctypes

from tensorfork.interpreter.settings import process_settings_allowed


def retain_freed_memory(nbytes: int) -> None:
    """Have glibc keep up to twice `nbytes` of freed memory (at most 32 MiB), for the rest of the process's life.

    Both of glibc's bounds grow with the largest mapped block that was ever freed (`mallopt(3)`, M_MMAP_THRESHOLD), so
    one block is allocated and freed, untouched. With another C library this has no effect. Does nothing where
    process-wide settings are forbidden.
    """
    if process_settings_allowed():
        libc = ctypes.CDLL(None)
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
        libc.free(libc.malloc(nbytes))
