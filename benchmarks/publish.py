"""Publishing, the way of the layout to the fork, and how long the seed's interpreter is held meanwhile."""

from typing import Any

from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Outcome, interleave

PUBLISH_MS = {True: 100.0, False: 500.0}
"""For up to 300 tensors, and for more."""
LAYOUT_MS, STALL_MS = 500.0, 5.0


def case(bench: Bench, outcome: Outcome, *, shape: str) -> None:
    """Publish, and fork once with a thread in the seed that wants to run every millisecond."""
    seed, fork = bench.start("seed", bench.source), bench.start("fork", bench.sink)
    bench.ask_all((seed, fork), "api.warm_up", timeout=START_TIMEOUT)
    for worker in (seed, fork):
        built = bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=worker is seed)

    def publish_and_fork() -> dict[str, Any]:
        published = bench.ask(seed, "api.publish", transports=["zeromq"])
        bench.ask(seed, "interpreter.start_ticker")
        forked = bench.ask(fork, "api.fork", address=published["address"], transport="zeromq", verify=False)
        gaps = bench.ask(seed, "interpreter.stop_ticker")
        return {"publish": published, "fork": forked, "gaps": gaps}

    def idle() -> float:
        bench.ask(seed, "interpreter.start_ticker")
        bench.ask(fork, "interpreter.sleep", seconds=0.3)
        return 1e3 * max(gap for _, gap in bench.ask(seed, "interpreter.stop_ticker"))

    values = interleave({"fork": publish_and_fork, "idle": idle}, bench.rounds, outcome)
    rounds = values["fork"]
    forks = [one["fork"] for one in rounds]
    outcome.detail |= {"tensors": built["tensors"], "nbytes": built["nbytes"], "forks": forks}
    publish_ms = [1e3 * one["publish"]["seconds"] for one in rounds]
    outcome.add("publish", publish_ms, "ms", goal=PUBLISH_MS[built["tensors"] <= 300], less=True)
    outcome.add("publish, processor time", [1e3 * one["publish"]["cpu_seconds"] for one in rounds], "ms")
    layout_ms = [1e3 * one["seconds"]["layout"] for one in forks]
    outcome.add("layout reaches the fork", layout_ms, "ms", goal=LAYOUT_MS, less=True)
    stalls_ms = [1e3 * _longest_stall(one["fork"], one["gaps"]) for one in rounds]
    outcome.add("seed's interpreter held, greeting and layout", stalls_ms, "ms", goal=STALL_MS, less=True)
    outcome.add("the same, nobody forks", values["idle"], "ms")
    outcome.add(
        "whole fork but the transfer", [1e3 * (one["whole"] - one["seconds"]["transfer"]) for one in forks], "ms"
    )


def _longest_stall(forked: dict[str, Any], gaps: list[tuple[float, float]]) -> float:
    """The most seconds that the seed's thread overslept while the fork connected and fetched the layout."""
    phases = forked["seconds"]
    start = forked["start"] + phases["survey"]
    end = start + sum(phases[name] for name in ("resolve", "hello", "layout"))
    return max((gap for at, gap in gaps if at < end and at + gap > start), default=0.0)
