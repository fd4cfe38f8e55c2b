"""How long a second process takes to its first tokens: forked, and loaded from files in the page cache."""

import time
from functools import partial
from typing import Any

from benchmarks import fork
from benchmarks.bench import Bench
from benchmarks.measure import Outcome, interleave
from benchmarks.process import Failed

METHODS = ("tensorfork", "fastsafetensors", "from_pretrained")
PHASES = ("imports", "device", "model", "weights", "first token", "further tokens")
TO_BEAT = "fastsafetensors"


def case(bench: Bench, outcome: Outcome, *, shape: str, transport: str) -> None:
    """From the start of a second process to its first eight tokens, by phase; the same tokens as the first one's."""
    shape = bench.shape(shape)
    folder = bench.folder(40 << 30 if bench.on_gpu else 4 << 30)
    first = fork.start(bench, "first", bench.source, transport)
    published = bench.ask(first, "ready.first", shape=shape, folder=folder, transport=transport)
    outcome.detail |= {"nbytes": published["nbytes"], "tokens": published["tokens"]}

    def ready(method: str) -> dict[str, Any]:
        began = time.monotonic()
        with bench.start(method, bench.sink, own_gpu=True) as worker:
            arguments = {"folder": folder, "address": published["address"], "transport": transport}
            result: dict[str, Any] = bench.ask(worker, "ready.second", method=method, began=began, **arguments)
        if result["tokens"] != published["tokens"]:
            raise Failed(f"{method}: the tokens are {result['tokens']}, and {published['tokens']} in the first process")
        return result

    values = interleave({method: partial(ready, method) for method in METHODS}, bench.rounds, outcome, warm_up=0)
    for method in METHODS:
        against = values[TO_BEAT] if method != TO_BEAT else ()
        whole = [one["whole"] for one in values[method]]
        outcome.add(f"{method}: ready", whole, "s", limit=TO_BEAT, against=[one["whole"] for one in against])
        for phase in PHASES:
            outcome.add(f"{method}: {phase}", [one["seconds"][phase] for one in values[method]], "s")
    outcome.detail["samples"] = values
