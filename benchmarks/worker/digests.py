"""The digest's speed, and the speed at which the device reads."""

import time

import torch

from benchmarks.worker.state import WorkerState
from tensorfork.digest.batch import DigestBatch


def compute(state: WorkerState) -> dict[str, float]:
    """Digest the whole model; GB/s.

    `sums`: after the preparation, which reads none of the bytes; `whole`: with the preparation; `core`: the sums, by
    the processor time that they took.
    """
    state.sync()
    start = time.perf_counter()
    batch = DigestBatch.of(state.tensors)
    prepared, cpu_start = time.perf_counter(), time.process_time()
    batch.compute()
    state.sync()
    end, cpu_seconds = time.perf_counter(), time.process_time() - cpu_start
    seconds = {"sums": end - prepared, "whole": end - start, "core": max(cpu_seconds, 1e-9)}
    return {what: state.nbytes / spent / 1e9 for what, spent in seconds.items()}


def use_one_core(state: WorkerState) -> None:
    """Have torch use one thread."""
    torch.set_num_threads(1)


def read(state: WorkerState) -> float:
    """The device's read bandwidth in GB/s, from summing the words of one large buffer."""
    if "words" not in state.resources:
        nbytes = (4 << 30) if state.on_gpu else (256 << 20)
        state.resources["words"] = torch.ones(nbytes // 8, dtype=torch.int64, device=state.device)
    words = state.resources["words"].view(-1, 8192)
    state.sync()
    start = time.perf_counter()
    words.sum(1)
    state.sync()
    return words.nbytes / (time.perf_counter() - start) / 1e9
