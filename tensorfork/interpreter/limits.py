"""Whether this process gets more threads and file descriptors: asked before a library that cannot do without.

Where libzmq gets none it ends the process; gloo and torch's stores wait for ever, or until their timeout.
"""

import ctypes
import os
import resource
from functools import cache
from typing import Any

from tensorfork.exhaustion import DESCRIPTORS, THREADS, exhaustion, resources

FREE_DESCRIPTORS = 48
"""File descriptors that must be free before something begins. A ZeroMQ context with its sockets takes about a dozen."""
FREE_THREADS = 4
"""Threads that must be free beside those that something will have."""


STACK_BYTES = 1 << 20
"""Of the threads that are created to find out whether they can be: enough for what libraries keep in each thread."""


def require_descriptors() -> None:
    """Raise `ResourceExhausted` when this process has fewer than `FREE_DESCRIPTORS` left. Anybody can use them up, with
    idle connections to a seed.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with resources():
        used = len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and used + FREE_DESCRIPTORS > limit:
        raise exhaustion(f"{used} of {limit} are in use, too many to begin", DESCRIPTORS)


def descriptors_beyond() -> int:
    """How many file descriptors this process has beyond three quarters of its limit, of which it keeps a quarter for
    others than who connects: 64 at least, and 1024 at most. Negative where there are fewer.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return -1
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # not even one for this
        used = limit
    return used - limit + min(1024, max(64, limit // 4))


def require_threads(count: int) -> None:
    """Raise `ResourceExhausted` when the system does not give this process so many more threads, and `FREE_THREADS`.

    They are created and ended again, in some 0.1 ms each. They run no Python, and the interpreter is not given away
    meanwhile: a seed's engine would keep it for 5 ms. Their stacks are small: glibc keeps 40 MB of those of threads
    that have ended, and unmaps what is beyond, which takes long in a process that uses a GPU.
    """
    libc, semaphore = _libc(), (ctypes.c_uint64 * 4)()  # a sem_t, which has 32 bytes
    libc.sem_init(semaphore, 0, 0)
    attributes = (ctypes.c_uint64 * 8)()  # a pthread_attr_t, which has 56
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK_BYTES))
    ids: list[ctypes.c_ulong] = []
    while len(ids) < count + FREE_THREADS:
        id = ctypes.c_ulong()
        if libc.pthread_create(ctypes.byref(id), attributes, libc.sem_wait, semaphore):
            break
        ids.append(id)
    for _ in ids:
        libc.sem_post(semaphore)
    for id in ids:
        libc.pthread_join(id, None)
    if len(ids) < count + FREE_THREADS:
        raise exhaustion(f"it gets {len(ids)} more, and needs {count} and some for others", THREADS)


@cache
def _libc() -> Any:
    return ctypes.PyDLL(None)
