"""Mooncake's wheel: which one is installed, and importing it, so that what is wrong is said with what mends it.

All wheels bring the same module, `mooncake`, built for different machines; two of them overwrite one another.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import weakref
from types import ModuleType
from typing import Any

import torch
from attrs import frozen

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.environment import environment
from tensorfork.interpreter.settings import process_settings_allowed

EXTRAS = {
    "mooncake-transfer-engine": "transfer-engine",
    "mooncake-transfer-engine-cuda13": "transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda": "transfer-engine-cpu",
}
"""Wheels that a tensorfork extra brings."""
_OTHERS = ("efa", "efa-cuda13", "efa-non-cuda", "musa", "npu", "rocm")
_WITHOUT_CUDA = {"mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-efa-non-cuda"}
_PACKAGES = {
    "libibverbs": "libibverbs1",
    "libmlx5": "ibverbs-providers",
    "libnuma": "libnuma1",
    "libcurl": "libcurl4",
}
"""Debian's names for what the wheels link against and do not bring."""
_NEVER = dict.fromkeys(
    (
        "MC_FORCE_TCP",
        "MC_FORCE_HCA",
        "MC_FORCE_MNNVL",
        "MC_FORCE_SHM",
        "MC_INTRANODE_NVLINK",
        "MC_LEGACY_RPC_PORT_BINDING",
        "MC_USE_TENT",
        "MC_USE_TEV1",
    )
)
ENVIRONMENT: dict[str, dict[str, str | None]] = {
    "nvlink": {**_NEVER, "MC_INTRANODE_NVLINK": "1"},
    "rdma": {**_NEVER, "MC_FORCE_HCA": "1"},  # without it, an engine that finds no NIC quietly takes TCP
    "tcp": {**_NEVER, "MC_FORCE_TCP": "1"},
}
"""What Mooncake must read when an engine for a fabric is initialised; it chooses the transport by that alone."""
_SILENT = 3
"""glog's level of fatal messages."""


@frozen
class Wheel:
    """The Mooncake wheel that is installed. `cuda` says whether it can touch the memory of GPUs."""

    name: str
    version: str

    @property
    def cuda(self) -> bool:
        """Whether it was built with CUDA."""
        return self.name not in _WITHOUT_CUDA

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def wheel() -> Wheel:
    """The one wheel there is. Imports nothing.

    Raises `TransportUnavailable`, with the command that mends it, where there is none, or more than one.
    """
    module = sys.modules.get("mooncake.engine")
    if module is not None and module in _wheel_of:
        return _wheel_of[module]
    found = _wheels()
    if len(found) > 1:
        names = [one.name for one in found]
        raise TransportUnavailable(
            f"{' and '.join(map(str, found))} are both installed, and each overwrites the other's files. Keep one: "
            f"pip uninstall -y {' '.join(names)} && {_install()}"
        )
    if not found or importlib.util.find_spec("mooncake") is None:
        raise TransportUnavailable(f"Mooncake's TransferEngine is not installed: {_install()}")
    if module is not None:
        _wheel_of[module] = found[0]
    return found[0]


_wheel_of: weakref.WeakKeyDictionary[ModuleType, Wheel] = weakref.WeakKeyDictionary()
"""Once it is imported, nothing changes any more; and to look takes milliseconds, which a seed's steps would feel."""


def load() -> Any:
    """The module `mooncake.engine`, imported now if it was not, and then told to be quiet.

    Mooncake reads most of its settings at this moment, once for the process.

    Raises `TransportUnavailable`, with the command that mends it, where it cannot be imported.
    """
    if "mooncake.engine" in sys.modules:
        return sys.modules["mooncake.engine"]
    with environment({"MC_LOG_DIR": None}, {"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR")}):
        try:
            module = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransportUnavailable(_what_is_missing(error)) from error
    if "MC_LOG_LEVEL" not in os.environ and process_settings_allowed():
        _silence()
    return module


def _wheels() -> list[Wheel]:
    names = [*EXTRAS, *(f"mooncake-transfer-engine-{other}" for other in _OTHERS)]
    found = []
    for name in names:
        try:
            found.append(Wheel(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            pass  # most of them are not there
    return found


def _install() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return "pip install 'tensorfork[transfer-engine-cpu]'"
    return f"pip install 'tensorfork[{'transfer-engine' if cuda.startswith('12.') else 'transfer-engine-cuda13'}]'"


def _what_is_missing(error: ImportError) -> str:
    missing = str(error).partition(":")[0]
    text = f"Mooncake's TransferEngine cannot be imported: {error}."
    for library, package in _PACKAGES.items():
        if missing.startswith(library):
            others = " ".join(name for name in _PACKAGES.values() if name != package)
            return f"{text} Install what it links against: apt-get install -y {package} {others}"
    if missing.startswith("libcuda.so"):
        return f"{text} The wheel is for NVIDIA GPUs and there is no driver; without GPUs: {_exchange('cpu')}"
    if missing.startswith("libcudart.so.12"):
        return f"{text} The wheel is for CUDA 12, and torch brings {_brought()}: {_exchange('cuda13')}"
    if missing.startswith("libcudart.so.13"):
        return f"{text} The wheel is for CUDA 13, and torch brings {_brought()}: {_exchange('')}"
    return f"{text} Install it again: pip install --force-reinstall --no-deps {_name()}"


def _brought() -> str:
    return "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _exchange(suffix: str) -> str:
    extra = "-".join(filter(None, ["transfer-engine", suffix]))
    return f"pip uninstall -y {_name()} && pip install 'tensorfork[{extra}]'"


def _name() -> str:
    return " ".join(one.name for one in _wheels()) or "mooncake-transfer-engine"


def _silence() -> None:
    """Have Mooncake's glog print fatal messages alone: even at ERROR it tells what is no error, and what we raise.

    Its flag is a plain variable of the library that the wheel brings along. Where that cannot be found, the lines stay.
    """
    try:
        with open("/proc/self/maps") as maps:
            path = next(line.split(None, 5)[5].strip() for line in maps if "/libglog" in line)
        ctypes.c_int.in_dll(ctypes.CDLL(path), "_ZN3fLI17FLAGS_minloglevelE").value = _SILENT
    except (OSError, StopIteration, ValueError):
        return
