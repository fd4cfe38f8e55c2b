"""The machine that the figures were measured on."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import tensorfork
from benchmarks.worker.state import WorkerState

PACKAGES = (
    "pyzmq",
    "safetensors",
    "transformers",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
)


def describe(state: WorkerState) -> dict[str, Any]:
    """Processor, memory, GPUs and versions."""
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "tensorfork": tensorfork.__version__,
        "torch": torch.__version__,
        "packages": dict(filter(None, map(_version, PACKAGES))),
        "gpus": [],
    }
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
        found["gpu_memory_gb"] = round(torch.cuda.mem_get_info(0)[1] / 1e9)
        found["cuda"] = torch.version.cuda
        found["peer_access"] = count > 1 and torch.cuda.can_device_access_peer(0, 1)
    return found


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def _version(name: str) -> tuple[str, str] | None:
    try:
        return name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
