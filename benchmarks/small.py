"""What is not about speed: publishing, the layout's way to the fork, the seed's interpreter; and the digest's speed."""

from typing import Any

from benchmarks import limits
from benchmarks.bench import START, Bench
from benchmarks.measure import Measure, Outcome, interleave

PUBLISH_MS = {True: 100.0, False: 500.0}
"""For up to 300 tensors, and for more."""
LAYOUT_MS, STALL_MS = 500.0, 5.0
DIGEST_CPU = 6.0
"""GB/s on one core."""


def publish_case(bench: Bench, outcome: Outcome, *, shape: str) -> None:
    """Publish, and fork once with a thread in the seed that wants to run every millisecond."""
    seed, fork = bench.start("seed", bench.source), bench.start("fork", bench.sink)
    bench.all((seed, fork), "sides.warm_up", timeout=START)
    for worker in (seed, fork):
        built = bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=worker is seed)

    def once() -> dict[str, Any]:
        published = bench.ask(seed, "sides.publish", transports=["zeromq"])
        bench.ask(seed, "timing.tick")
        forked = bench.ask(fork, "sides.fork", address=published["address"], transport="zeromq", verify=False)
        gaps = bench.ask(seed, "timing.tock")
        return {"publish": published, "fork": forked, "gaps": gaps}

    def idle() -> float:
        bench.ask(seed, "timing.tick")
        bench.ask(fork, "timing.rest", seconds=0.3)
        return 1e3 * max(gap for _, gap in bench.ask(seed, "timing.tock"))

    found = interleave({"fork": once, "idle": idle}, bench.rounds, outcome)
    few = built["tensors"] <= 300
    forks = found["fork"]
    outcome.detail |= {"tensors": built["tensors"], "nbytes": built["nbytes"], "forks": [one["fork"] for one in forks]}
    published = [1e3 * one["publish"]["seconds"] for one in forks]
    outcome.add("publish", published, "ms", goal=PUBLISH_MS[few], less=True)
    outcome.add("publish, processor time", [1e3 * one["publish"]["processor"] for one in forks], "ms")
    layouts = [1e3 * one["fork"]["seconds"]["layout"] for one in forks]
    outcome.add("layout reaches the fork", layouts, "ms", goal=LAYOUT_MS, less=True)
    stalls = [1e3 * _stall(one["fork"], one["gaps"]) for one in forks]
    outcome.add("seed's interpreter held, greeting and layout", stalls, "ms", goal=STALL_MS, less=True)
    outcome.add("the same, nobody forks", found["idle"], "ms")
    outcome.add("whole fork but the transfer", [1e3 * _rest(one["fork"]) for one in forks], "ms")


def digest_case(bench: Bench, outcome: Outcome, *, shape: str, goal: float) -> None:
    """The digest, beside what the device reads."""
    worker = bench.start("digest", bench.sink)
    bench.ask(worker, "sides.warm_up", timeout=START)
    bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    if not bench.on_gpu:
        bench.ask(worker, "timing.one_core")
    measures: dict[str, Measure] = {
        "digest": lambda: bench.ask(worker, "timing.digests"),
        "reading": lambda: bench.ask(worker, "timing.reading"),
    }
    if not bench.on_gpu:
        measures |= limits.memcpy(bench, worker)
    found = interleave(measures, bench.rounds, outcome)
    limit = "reading" if bench.on_gpu else None
    names = {"sums": "digest", "whole": "digest and its preparation"}
    for what, name in (names if bench.on_gpu else names | {"core": "digest, by the core's own time"}).items():
        speeds = [one[what] for one in found["digest"]]
        outcome.add(name, speeds, "GB/s", limit=limit, against=found["reading"], goal=goal if what == "sums" else None)
    for name in ("reading", limits.MEMCPY):
        outcome.add(name, found.get(name, ()), "GB/s")


def _stall(forked: dict[str, Any], gaps: list[tuple[float, float]]) -> float:
    """The longest that the seed's thread overslept while the fork greeted and fetched the layout, in seconds."""
    phases = forked["seconds"]
    begin = forked["began"] + phases["survey"]
    end = begin + sum(phases[name] for name in ("resolve", "hello", "layout"))
    return max((gap for at, gap in gaps if at < end and at + gap > begin), default=0.0)


def _rest(forked: dict[str, Any]) -> float:
    return float(forked["whole"] - forked["seconds"]["transfer"])
