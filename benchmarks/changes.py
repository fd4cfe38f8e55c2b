"""What a published model costs the seed: the look before a lease, and leaving `updating()`."""

from functools import partial

from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Outcome, interleave

LOOK_MS = 15.0
"""For 20,000 tensors."""
UPDATING_MS = 10.0
"""For Llama-3-8B."""
KINDS = {
    "look": "the look before a lease",
    "values only": "updating(values_only=True)",
    "unchanged": "updating(), nothing replaced",
    "replaced": "updating(), one tensor replaced",
}


def case(bench: Bench, outcome: Outcome, *, shape: str) -> None:
    """Look at a published model, and leave `updating()` after nothing, and after something, was replaced."""
    seed = bench.start("seed", bench.source)
    bench.ask(seed, "api.warm_up", timeout=START_TIMEOUT)
    built = bench.ask(seed, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    bench.ask(seed, "api.publish", transports=None)
    steps = {kind: partial(bench.ask, seed, "changes.change", kind=kind) for kind in KINDS}
    values = interleave(steps, bench.rounds, outcome)
    outcome.detail["tensors"] = built["tensors"]
    small = built["tensors"] <= 300
    goals = {"look": None if small else LOOK_MS, "unchanged": UPDATING_MS if small else None}
    for kind, words in KINDS.items():
        outcome.add(words, [1e3 * seconds for seconds in values[kind]], "ms", goal=goals.get(kind), less=True)
