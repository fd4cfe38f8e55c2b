"""How long imports take in an interpreter that has imported torch and nothing of tensorfork."""

import importlib
import sys
import time

from benchmarks.worker.state import WorkerState  # this imports torch


def import_modules(state: WorkerState, *, names: list[str]) -> dict[str, float]:
    """Import these modules; the seconds, and the number of modules that were loaded.

    Raises `RuntimeError` where one of them is imported already, as a second import would take no time.
    """
    if present := [name for name in names if name in sys.modules]:
        raise RuntimeError(f"imported already: {', '.join(present)}")
    before = len(sys.modules)
    start = time.perf_counter()
    for name in names:
        importlib.import_module(name)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "modules": len(sys.modules) - before}
