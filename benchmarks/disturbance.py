"""What forks do to the seed: how long its steps take when nobody forks, and while forks run without pause."""

import time
from typing import Any

from benchmarks.bench import START, Bench
from benchmarks.measure import Outcome

GOAL = 1.15
"""Of p99 during forks, to p99 idle."""
GENTLE_GOALS = {"nccl": 1.5}
"""With a rate limit or another gentle setting; 1.10 where not named."""
SETTLE = 1.0
"""Seconds of forking before steps are timed."""


def case(bench: Bench, outcome: Outcome, *, load: str, shape: str | None, transport: str) -> None:
    """Steps of the load in the seed: idle, during forks over the transport, idle again.

    `shape` is what the seed publishes; None for the load's own model.
    """
    seed = bench.start("seed", bench.source, alone=True)
    fork = bench.start("fork", bench.sink, alone=True)
    for worker in (seed, fork):
        worker.post("sides.warm_up", transport=transport)
    for worker in (seed, fork):
        bench.result(worker, START)
    bench.ask(seed, "steps.prepare", timeout=START, load=load)
    if shape is not None:
        bench.ask(seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    address = bench.ask(seed, "sides.publish", transports=[transport])["address"]
    taken = bench.ask(fork, "sides.take", address=address, transport=transport)
    before = _steps(bench, seed)
    fork.post("sides.forks", address=address, transport=transport, verify=False, seconds=bench.seconds + 2 * SETTLE)
    time.sleep(SETTLE)
    during = _steps(bench, seed)
    forked = bench.result(fork, bench.seconds + bench.timeout)
    after = _steps(bench, seed)
    outcome.detail |= {"transport": transport, "load": load, "taken": taken, "forks": forked}
    outcome.detail["steps"] = {"idle": before, "forks": during, "idle again": after}
    _rows(outcome, transport, outcome.detail["steps"])
    outcome.add("speed kept up", [forked["gbps"]], "GB/s")
    outcome.add("forks", [forked["forks"]], "")


def _steps(bench: Bench, seed: Any) -> dict[str, Any]:
    return bench.ask(seed, "steps.run", timeout=bench.seconds + bench.timeout, seconds=bench.seconds)


def _rows(outcome: Outcome, transport: str, steps: dict[str, Any]) -> None:
    name, _, options = transport.partition(",")
    goal = GENTLE_GOALS.get(name, 1.10) if options else GOAL
    for mark in ("p50", "p99", "p99.9"):
        idle = [steps["idle"][mark]]
        outcome.add(f"{mark} idle", idle, "ms")
        wanted = goal if mark == "p99" else None
        outcome.add(
            f"{mark} during forks", [steps["forks"][mark]], "ms", limit="idle", against=idle, goal=wanted, less=True
        )
        outcome.add(f"{mark} idle again", [steps["idle again"][mark]], "ms", limit="idle", against=idle)
