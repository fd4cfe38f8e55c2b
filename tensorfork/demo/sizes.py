"""Sizes, durations and speeds as text for people."""

import re

from tensorfork.demo.failure import DemoFailed

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes, from ``8GiB``, ``500 MB`` or ``1000000``. Raises `DemoFailed`."""
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if parsed is None or parsed[2].lower() not in units:
        raise DemoFailed(f"{text!r} is not a size; write for example 512MiB, 8GiB or 2GB")
    return int(float(parsed[1]) * units[parsed[2].lower()])


def format_size(nbytes: float) -> str:
    """Bytes for a person, in powers of ten as speeds are, such as ``90.9 MB``."""
    for unit in ("TB", "GB", "MB", "kB"):
        if nbytes >= _UNITS[unit]:
            return f"{nbytes / _UNITS[unit]:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def format_seconds(seconds: float) -> str:
    """Seconds for a person, such as ``1.23 s`` or ``12.3 ms``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def format_speed(nbytes: float, seconds: float) -> str:
    """Bytes a second for a person: GB/s, or MB/s below 0.1 GB/s."""
    speed = nbytes / seconds if seconds else 0.0
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e8 else f"{speed / 1e6:.1f} MB/s"
