"""Which process this is, and on which host: what two sides compare to learn whether they share one."""

import os
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")
_random = os.urandom(8)


def process_token() -> bytes:
    """16 bytes that no other process has: not a child of os.fork(), and none on another host."""
    return _random + os.getpid().to_bytes(8, "little")


@cache
def host_id() -> str:
    """Identifies the running kernel: two processes with the same value share a host."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return os.uname().nodename


def host_and_network_id() -> str | None:
    """Identifies the running kernel and this process's network namespace; None where they cannot be told."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {_NETWORK_NAMESPACE.readlink()}"
    except OSError:
        return None
