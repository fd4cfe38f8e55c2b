"""What forks do to the seed: how long its steps take when nobody forks, and while forks run without pause."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.bench import START, Bench
from benchmarks.measure import Outcome, distribution
from benchmarks.process import Worker

GOAL = 1.15
"""Of p99 during forks, to p99 idle; on GPUs. On a CPU, steps and forks share the cores."""
GENTLE_GOALS = {"nccl": 1.5}
"""The same with a rate limit or another gentle setting; 1.10 where not named."""
MARKS = ("p50", "p99", "p99.9")
Step = tuple[float, float]
"""When it began, and how long it took, in ms."""
TURNS = 2
"""Of forks; one more of idling, so that each has idle turns on either side."""
SETTLE = 1.0
"""Seconds of forking before steps are timed."""


def case(bench: Bench, outcome: Outcome, *, load: str, shape: str | None, transport: str) -> None:
    """Steps of the load in the seed, by turns idle and during forks over the transport.

    `shape` is what the seed publishes; None for the load's own model.
    """
    seed = bench.start("seed", bench.source, alone=True)
    fork = bench.start("fork", bench.sink, alone=True)
    bench.all((seed, fork), "sides.warm_up", timeout=START, transport=transport)
    bench.ask(seed, "steps.prepare", timeout=START, load=load)
    if shape is not None:
        bench.ask(seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    address = bench.ask(seed, "sides.publish", transports=[transport])["address"]
    taken = bench.ask(fork, "sides.take", address=address, transport=transport)
    each = bench.seconds / TURNS
    idle, during, forked = [_steps(bench, seed, each)], list[list[Step]](), list[dict[str, Any]]()
    for _ in range(TURNS):
        fork.post("sides.forks", address=address, transport=transport, verify=False, seconds=each + 2 * SETTLE)
        time.sleep(SETTLE)
        during.append(_steps(bench, seed, each))
        forked.append(bench.result(fork, each + bench.timeout))
        idle.append(_steps(bench, seed, each))
    outcome.detail |= {"transport": transport, "load": load, "taken": taken, "forks": forked}
    windows = [window for one in forked for window in one["windows"]]
    while_moving = [spent for turn in during for spent in meeting(turn, windows)]
    outcome.detail["steps"] = {"idle": _all(idle), "forks": _all(during)}
    if while_moving:
        outcome.detail["steps"]["transfers"] = distribution(while_moving)
    outcome.detail["turns"] = {"idle": [_marks(one) for one in idle], "forks": [_marks(one) for one in during]}
    _rows(outcome, transport, judged=bench.on_gpu)


def _steps(bench: Bench, seed: Worker, seconds: float) -> list[Step]:
    found: list[Step] = bench.ask(seed, "steps.run", timeout=seconds + bench.timeout, seconds=seconds)
    return found


def meeting(steps: Sequence[Step], windows: Sequence[tuple[float, float]]) -> Iterator[float]:
    """How long those steps took during which bytes were on their way for some time."""
    for began, spent in steps:
        ended = began + spent / 1e3
        if any(began < end and ended > start for start, end in windows):
            yield spent


def _all(turns: Sequence[Sequence[Step]]) -> dict[str, Any]:
    return distribution([spent for turn in turns for _, spent in turn])


def _marks(turn: Sequence[Step]) -> dict[str, float]:
    found = distribution([spent for _, spent in turn])
    return {mark: found[mark] for mark in MARKS}


def _rows(outcome: Outcome, transport: str, *, judged: bool) -> None:
    name, _, options = transport.partition(",")
    goal = GENTLE_GOALS.get(name, 1.10) if options else GOAL
    steps, turns, forked = (outcome.detail[what] for what in ("steps", "turns", "forks"))
    for mark in MARKS:
        wanted = goal if mark == "p99" and judged else None
        during, idle = [steps["forks"][mark]], [steps["idle"][mark]]
        outcome.add(f"{mark} during forks", during, "ms", limit="idle", against=idle, goal=wanted, less=True)
        drift = [turn[mark] for turn in turns["idle"]]
        outcome.add(f"{mark} idle, worst turn", [max(drift)], "ms", limit="best turn", against=[min(drift)])
    moving = steps.get("transfers")
    for mark in ("p50", "p99") if moving else ():
        outcome.add(f"{mark} during transfers", [moving[mark]], "ms", limit="idle", against=[steps["idle"][mark]])
    outcome.add("steps that met a transfer", [moving["steps"] if moving else 0], "")
    outcome.add("transfer", [speed for one in forked for speed in one["transfers"]], "GB/s")
    outcome.add("speed kept up", [one["gbps"] for one in forked], "GB/s")
    outcome.add("forks", [sum(one["forks"] for one in forked)], "")
