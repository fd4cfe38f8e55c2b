"""What forks do to the seed: how long its steps take while nobody forks, and while forks run without pause."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Outcome, distribution
from benchmarks.process import Worker

GOAL = 1.15
"""For the p99 during forks, to the p99 idle; on GPUs. There is none on a CPU, where steps and forks share the cores."""
GENTLE_GOALS = {"nccl": 1.5}
"""The same with a rate limit of the fork's or another gentle setting; 1.10 for transports that are not named, and where
the limit is the seed's."""
PERCENTILES = ("p50", "p99", "p99.9")
Step = tuple[float, float]
"""When it began (`time.monotonic`), and how many ms it took."""
INTERVALS = 2
"""Intervals with forks; there is an idle one before and after each."""
LEAD_SECONDS = 1.0
"""Seconds of forking before and after the steps that are timed."""


def case(
    bench: Bench,
    outcome: Outcome,
    *,
    load: str,
    shape: str | None,
    transport: str,
    rate_limit: float | None = None,
) -> None:
    """Steps of the load in the seed, by turns idle and during forks over the transport.

    `shape` is the model that the seed publishes; None for the load's own. `rate_limit` is the seed's, in bytes/s.
    """
    seed = bench.start("seed", bench.source, own_gpu=True)
    fork = bench.start("fork", bench.sink, own_gpu=True)
    bench.ask_all((seed, fork), "api.warm_up", timeout=START_TIMEOUT, transport=transport)
    bench.ask(seed, "workload.prepare", timeout=START_TIMEOUT, load=load)
    if shape is not None:
        bench.ask(seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    address = bench.ask(seed, "api.publish", transports=[transport], rate_limit=rate_limit)["address"]
    first_fork = bench.ask(fork, "api.fork_new", address=address, transport=transport)
    seconds = bench.seconds / INTERVALS
    idle, during, forked = [_steps(bench, seed, seconds)], list[list[Step]](), list[dict[str, Any]]()
    for _ in range(INTERVALS):
        forking = seconds + 2 * LEAD_SECONDS
        fork.post("api.fork_repeatedly", address=address, transport=transport, verify=False, seconds=forking)
        time.sleep(LEAD_SECONDS)
        during.append(_steps(bench, seed, seconds))
        forked.append(bench.result(fork, seconds + bench.timeout))
        idle.append(_steps(bench, seed, seconds))
    outcome.detail |= {"transport": transport, "load": load, "first_fork": first_fork, "forks": forked}
    outcome.detail["rate_limit"] = rate_limit
    windows = [window for one in forked for window in one["windows"]]
    during_transfers = [duration for steps in during for duration in overlapping(steps, windows)]
    outcome.detail["steps"] = {"idle": _all(idle), "forks": _all(during)}
    if during_transfers:
        outcome.detail["steps"]["transfers"] = distribution(during_transfers)
    outcome.detail["intervals"] = {
        "idle": [_percentiles(steps) for steps in idle],
        "forks": [_percentiles(steps) for steps in during],
    }
    _rows(outcome, transport, judged=bench.on_gpu)


def _steps(bench: Bench, seed: Worker, seconds: float) -> list[Step]:
    steps: list[Step] = bench.ask(seed, "workload.run", timeout=seconds + bench.timeout, seconds=seconds)
    return steps


def overlapping(steps: Sequence[Step], windows: Sequence[tuple[float, float]]) -> Iterator[float]:
    """The ms of the steps during which bytes moved for some time; `windows` are the transfers' starts and ends."""
    for start, duration in steps:
        end = start + duration / 1e3
        if any(start < transfer_end and end > transfer_start for transfer_start, transfer_end in windows):
            yield duration


def _all(intervals: Sequence[Sequence[Step]]) -> dict[str, Any]:
    return distribution([duration for steps in intervals for _, duration in steps])


def _percentiles(steps: Sequence[Step]) -> dict[str, float]:
    found = distribution([duration for _, duration in steps])
    return {percentile: found[percentile] for percentile in PERCENTILES}


def _rows(outcome: Outcome, transport: str, *, judged: bool) -> None:
    name, _, options = transport.partition(",")
    limited = outcome.detail["rate_limit"] is not None
    gentle_or_not = 1.10 if limited else GENTLE_GOALS.get(name, 1.10) if options else GOAL
    steps, intervals, forked = (outcome.detail[what] for what in ("steps", "intervals", "forks"))
    for percentile in PERCENTILES:
        goal = gentle_or_not if percentile == "p99" and judged else None
        during, idle = [steps["forks"][percentile]], [steps["idle"][percentile]]
        outcome.add(f"{percentile} during forks", during, "ms", limit="idle", against=idle, goal=goal, less=True)
        each = [interval[percentile] for interval in intervals["idle"]]
        outcome.add(f"{percentile} idle, worst turn", [max(each)], "ms", limit="best turn", against=[min(each)])
    moving = steps.get("transfers")
    for percentile in ("p50", "p99") if moving else ():
        during, idle = [moving[percentile]], [steps["idle"][percentile]]
        outcome.add(f"{percentile} during transfers", during, "ms", limit="idle", against=idle)
    outcome.add("steps that met a transfer", [moving["steps"] if moving else 0], "")
    outcome.add("transfer", [speed for one in forked for speed in one["transfers"]], "GB/s")
    outcome.add("speed kept up", [one["gbps"] for one in forked], "GB/s")
    outcome.add("forks", [sum(one["forks"] for one in forked)], "")
