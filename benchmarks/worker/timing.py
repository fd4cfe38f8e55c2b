"""The digest's speed, and how long the seed's interpreter is kept from everybody else."""

import threading
import time

import torch

from benchmarks.worker.state import State
from tensorfork.digest.batch import DigestBatch

TICK = 0.001


def digests(state: State) -> dict[str, float]:
    """Of the whole model, in GB/s.

    `sums`: once prepared, which needs none of the bytes; `whole`: with that; `core`: the sums by processor time.
    """
    state.sync()
    began = time.perf_counter()
    checksums = DigestBatch.of(state.tensors)
    prepared, used = time.perf_counter(), time.process_time()
    checksums.compute()
    state.sync()
    ended, used = time.perf_counter(), time.process_time() - used
    spent = {"sums": ended - prepared, "whole": ended - began, "core": max(used, 1e-9)}
    return {what: state.nbytes / seconds / 1e9 for what, seconds in spent.items()}


def one_core(state: State) -> None:
    """Torch is to use one thread."""
    torch.set_num_threads(1)


def reading(state: State) -> float:
    """The device's read bandwidth, in GB/s: the largest sum of words over one buffer."""
    if "words" not in state.kept:
        nbytes = (4 << 30) if state.on_gpu else (256 << 20)
        state.kept["words"] = torch.ones(nbytes // 8, dtype=torch.int64, device=state.device)
    words = state.kept["words"].view(-1, 8192)
    state.sync()
    began = time.perf_counter()
    words.sum(1)
    state.sync()
    return words.nbytes / (time.perf_counter() - began) / 1e9


def processor(state: State) -> float:
    """Seconds of a core's time that this process has used."""
    return time.process_time()


def tick(state: State) -> None:
    """Start a thread that wants to run every millisecond, as an engine's own loop would."""
    ended, gaps = threading.Event(), list[tuple[float, float]]()

    def run() -> None:
        last = time.monotonic()
        while not ended.is_set():
            time.sleep(TICK)
            now = time.monotonic()
            gaps.append((last, now - last - TICK))
            last = now

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    state.kept["tick"] = ended, gaps, thread


def tock(state: State) -> list[tuple[float, float]]:
    """Stop it: when it went to sleep each time (`time.monotonic`), and by how many seconds it overslept."""
    ended, gaps, thread = state.kept.pop("tick")
    ended.set()
    thread.join()
    return gaps


def rest(state: State, *, seconds: float) -> None:
    """Do nothing."""
    time.sleep(seconds)
