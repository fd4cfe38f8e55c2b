"""How long the interpreter keeps other threads waiting, and the processor time that the process uses."""

import threading
import time

from benchmarks.worker.state import WorkerState

TICK = 0.001


def cpu_seconds(state: WorkerState) -> float:
    """Seconds of processor time that this process has used."""
    return time.process_time()


def start_ticker(state: WorkerState) -> None:
    """Start a thread that wants to run every millisecond, as an engine's own loop would."""
    stopped, gaps = threading.Event(), list[tuple[float, float]]()

    def run() -> None:
        last = time.monotonic()
        while not stopped.is_set():
            time.sleep(TICK)
            now = time.monotonic()
            gaps.append((last, now - last - TICK))
            last = now

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    state.resources["ticker"] = stopped, gaps, thread


def stop_ticker(state: WorkerState) -> list[tuple[float, float]]:
    """Stop the thread; when each of its sleeps began (`time.monotonic`), and by how many seconds it overslept."""
    stopped, gaps, thread = state.resources.pop("ticker")
    stopped.set()
    thread.join()
    return gaps


def sleep(state: WorkerState, *, seconds: float) -> None:
    """Do nothing for so long."""
    time.sleep(seconds)
