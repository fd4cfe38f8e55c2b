"""Mooncake's wheel: which one is installed, and importing it. Each error carries the command that mends it.

All wheels bring the same module, `mooncake`, built for different machines. Two wheels overwrite each other's files.
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

_WHEELS = (
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine-efa",
    "mooncake-transfer-engine-efa-cuda13",
    "mooncake-transfer-engine-efa-non-cuda",
    "mooncake-transfer-engine-musa",
    "mooncake-transfer-engine-npu",
    "mooncake-transfer-engine-rocm",
)
"""Extras of tensorfork install the first three."""
_WITHOUT_CUDA = {"mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-efa-non-cuda"}
_DEBIAN_PACKAGES = {
    "libibverbs": "libibverbs1",
    "libmlx5": "ibverbs-providers",
    "libnuma": "libnuma1",
    "libcurl": "libcurl4",
}
"""The Debian packages of the libraries that the wheels link against and do not contain."""
_UNSET: dict[str, str | None] = dict.fromkeys(
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
    "nvlink": {**_UNSET, "MC_INTRANODE_NVLINK": "1"},
    "rdma": {**_UNSET, "MC_FORCE_HCA": "1"},  # without it, an engine that finds no NIC quietly takes TCP
    "tcp": {**_UNSET, "MC_FORCE_TCP": "1"},
}
"""By fabric, the variables that Mooncake must find when an engine is initialised: they alone choose its transport."""
_GLOG_FATAL = 3
"""glog's severity of fatal messages."""


@frozen
class Wheel:
    """A Mooncake wheel."""

    name: str
    version: str

    @property
    def cuda(self) -> bool:
        """Whether it was built with CUDA, and so can read and write the memory of GPUs."""
        return self.name not in _WITHOUT_CUDA

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def installed_wheel() -> Wheel:
    """The one wheel that is installed. Imports nothing.

    Raises `TransportUnavailable`, with the command that mends it, where there is none or more than one.
    """
    module = sys.modules.get("mooncake.engine")
    if module is not None and module in _imported_wheel:
        return _imported_wheel[module]
    found = _installed_wheels()
    if len(found) > 1:
        names = [one.name for one in found]
        raise TransportUnavailable(
            f"{' and '.join(map(str, found))} are both installed, and each overwrites the other's files. Keep one: "
            f"pip uninstall -y {' '.join(names)} && {_install_command()}"
        )
    if not found or importlib.util.find_spec("mooncake") is None:
        raise TransportUnavailable(f"Mooncake's TransferEngine is not installed: {_install_command()}")
    if module is not None:
        _imported_wheel[module] = found[0]
    return found[0]


_imported_wheel: weakref.WeakKeyDictionary[ModuleType, Wheel] = weakref.WeakKeyDictionary()
"""The wheel of the imported module, which cannot change any more. Looking it up takes milliseconds, and would delay a
seed's steps each time.
"""


def needed_environment(fabric: str) -> dict[str, str | None]:
    """What must stand in the environment until an engine for a fabric is there: MC_LOG_DIR aborts Mooncake's import."""
    importing = {} if "mooncake.engine" in sys.modules else {"MC_LOG_DIR": None}
    return ENVIRONMENT[fabric] | importing


def load() -> Any:
    """Import the module `mooncake.engine`, unless it is imported already, and silence its log.

    Mooncake reads most of its settings when it is imported, once for the process.

    Raises `TransportUnavailable`, with the command that mends it, where it cannot be imported.
    """
    if "mooncake.engine" in sys.modules:
        return sys.modules["mooncake.engine"]
    with environment({"MC_LOG_DIR": None}, {"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR")}):
        try:
            module = importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransportUnavailable(_explain(error)) from error
    if "MC_LOG_LEVEL" not in os.environ and process_settings_allowed():
        _silence_log()
    return module


def _installed_wheels() -> list[Wheel]:
    found = []
    for name in _WHEELS:
        try:
            found.append(Wheel(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            pass  # not installed
    return found


def _install_command() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return "pip install 'tensorfork[transfer-engine-cpu]'"
    return f"pip install 'tensorfork[{'transfer-engine' if cuda.startswith('12.') else 'transfer-engine-cuda13'}]'"


def _explain(error: ImportError) -> str:
    missing = str(error).partition(":")[0]
    text = f"Mooncake's TransferEngine cannot be imported: {error}."
    for library, package in _DEBIAN_PACKAGES.items():
        if missing.startswith(library):
            others = " ".join(name for name in _DEBIAN_PACKAGES.values() if name != package)
            return f"{text} Install what it links against: apt-get install -y {package} {others}"
    if missing.startswith("libcuda.so"):
        return f"{text} The wheel is for NVIDIA GPUs and there is no driver; without GPUs: {_replace_command('cpu')}"
    if missing.startswith("libcudart.so.12"):
        return f"{text} The wheel is for CUDA 12, and torch brings {_torch_cuda()}: {_replace_command('cuda13')}"
    if missing.startswith("libcudart.so.13"):
        return f"{text} The wheel is for CUDA 13, and torch brings {_torch_cuda()}: {_replace_command('')}"
    return f"{text} Install it again: pip install --force-reinstall --no-deps {_installed_names()}"


def _torch_cuda() -> str:
    return "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _replace_command(suffix: str) -> str:
    extra = "-".join(filter(None, ["transfer-engine", suffix]))
    return f"pip uninstall -y {_installed_names()} && pip install 'tensorfork[{extra}]'"


def _installed_names() -> str:
    return " ".join(one.name for one in _installed_wheels()) or "mooncake-transfer-engine"


def _silence_log() -> None:
    """Make Mooncake's glog print fatal messages alone. At ERROR it also prints what is no error, and what we raise.

    The flag is a plain variable of the glog library in the wheel. Where it cannot be found, the log stays as it is.
    """
    try:
        with open("/proc/self/maps") as maps:
            path = next(line.split(None, 5)[5].strip() for line in maps if "/libglog" in line)
        ctypes.c_int.in_dll(ctypes.CDLL(path), "_ZN3fLI17FLAGS_minloglevelE").value = _GLOG_FATAL
    except (OSError, StopIteration, ValueError):
        return
