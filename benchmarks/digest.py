"""The speed of the digest."""

from benchmarks import limits
from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Measure, Outcome, interleave

CPU_GOAL = 6.0
"""GB/s on one core."""


def case(bench: Bench, outcome: Outcome, *, shape: str, goal: float) -> None:
    """The digest, beside what the device reads."""
    worker = bench.start("digest", bench.sink)
    bench.ask(worker, "api.warm_up", timeout=START_TIMEOUT)
    bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    if not bench.on_gpu:
        bench.ask(worker, "digests.use_one_core")
    measures: dict[str, Measure] = {
        "digest": lambda: bench.ask(worker, "digests.compute"),
        "reading": lambda: bench.ask(worker, "digests.read"),
    }
    if not bench.on_gpu:
        measures |= limits.memcpy(bench, worker)
    values = interleave(measures, bench.rounds, outcome)
    limit = "reading" if bench.on_gpu else None
    names = {"sums": "digest", "whole": "digest and its preparation"}
    for what, name in (names if bench.on_gpu else names | {"core": "digest, by the core's own time"}).items():
        speeds = [one[what] for one in values["digest"]]
        outcome.add(name, speeds, "GB/s", limit=limit, against=values["reading"], goal=goal if what == "sums" else None)
    for name in ("reading", limits.MEMCPY):
        outcome.add(name, values.get(name, ()), "GB/s")
