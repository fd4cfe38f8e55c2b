"""What it costs to forbid process-wide settings: the same publishes and forks with and without them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import fork
from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Measure, Outcome, interleave
from benchmarks.process import Failed, Worker

VARIABLE = "TENSORFORK_PROCESS_SETTINGS"
ENVIRONMENTS = {"allowed": {VARIABLE: "1"}, "forbidden": {VARIABLE: "0"}}
"""Processes are started with them, as some settings stay when they are forbidden later."""


def case(bench: Bench, outcome: Outcome, *, shape: str, transport: str) -> None:
    """Publish and cold verified forks, process-wide settings forbidden on both sides, beside the same with them."""
    seeds = {mode: _seed(bench, mode, shape, transport) for mode in ENVIRONMENTS}
    publishes: dict[str, Measure] = {
        mode: partial(bench.ask, seed, "api.publish", transports=[transport]) for mode, seed in seeds.items()
    }
    published = interleave(publishes, bench.rounds, outcome)
    outcome.detail |= {"transport": transport, "publishes": published}
    addresses = {mode: found[-1]["address"] for mode, found in published.items() if found}
    forks = _cold_forks(bench, outcome, shape, transport, {mode: (seeds[mode], addresses[mode]) for mode in addresses})
    outcome.detail["cold into arena"] = {f"settings {mode}": found for mode, found in forks.items()}
    _compare(outcome, "publish", {mode: [1e3 * one["seconds"] for one in found] for mode, found in published.items()})
    _compare(
        outcome, "whole, cold, verified", {mode: [1e3 * one["whole"] for one in found] for mode, found in forks.items()}
    )


def _seed(bench: Bench, mode: str, shape: str, transport: str) -> Worker:
    seed = fork.start(bench, f"seed, {mode}", bench.source, transport, env=ENVIRONMENTS[mode])
    check_mode(bench, seed, mode)
    bench.ask(seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    return seed


def _cold_forks(
    bench: Bench, outcome: Outcome, shape: str, transport: str, published: dict[str, tuple[Worker, str]]
) -> dict[str, list[Any]]:
    """Fork `bench.cold` times in either mode, each time in a fresh process; all are started before the first forks."""
    count = max(1, bench.cold)
    workers = {
        mode: [
            fork.start(bench, f"fork{i}, {mode}", bench.sink, transport, env=ENVIRONMENTS[mode], wait=False)
            for i in range(count)
        ]
        for mode in published
    }
    for mode, started in workers.items():
        for worker in started:
            bench.result(worker, START_TIMEOUT)
            check_mode(bench, worker, mode)

    def forking(mode: str, ready: Iterator[Worker]) -> Measure:
        def measure() -> Any:
            worker, (seed, address) = next(ready), published[mode]
            bench.ask(worker, "models.build", shape=bench.shape(shape), placement="meta")
            bench.ask(seed, "api.wait_until_idle")
            forked = bench.ask(worker, "api.fork", address=address, transport=transport, verify=True)
            worker.close()
            return forked

        return measure

    measures = {mode: forking(mode, iter(started)) for mode, started in workers.items()}
    return interleave(measures, count, outcome, warm_up=0)


def check_mode(bench: Bench, worker: Worker, mode: str) -> None:
    """Raise `Failed` unless process-wide settings are "allowed" or "forbidden" in this worker, as `mode` says."""
    if bench.ask(worker, "api.settings_allowed") != (mode == "allowed"):
        raise Failed(f"{worker.name}: {VARIABLE} did not make process-wide settings {mode}")


def _compare(outcome: Outcome, what: str, milliseconds: dict[str, list[float]]) -> None:
    allowed, forbidden = milliseconds.get("allowed", []), milliseconds.get("forbidden", [])
    outcome.add(f"{what}, settings forbidden", forbidden, "ms", limit="settings allowed", against=allowed)
    outcome.add(f"{what}, settings allowed", allowed, "ms")
