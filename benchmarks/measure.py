"""Rounds, medians, ratios and goals."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.process import Failed, Skipped

Measure = Callable[[], Any]
BIN = 1.01
"""Each bin of a distribution reaches one percent further than the one before it."""


@dataclass
class Outcome:
    """What a case has found so far; it is kept when the case then fails.

    Attributes:
        rows: lines of the table; see `add`.
        detail: whatever else is worth keeping: phases, distributions.
        skipped: what could not be measured, and why.
        judged: whether goals apply; they do not to a model of another size than they were set for.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    judged: bool = True

    def add(
        self,
        what: str,
        samples: Sequence[float],
        unit: str,
        *,
        limit: str | None = None,
        against: Sequence[float] = (),
        goal: float | None = None,
        less: bool = False,
    ) -> None:
        """One line: the median of the samples and, where there is a limit, its ratio to the median of that.

        Args:
            what: what was measured.
            samples: one for each round.
            unit: GB/s (1e9 bytes a second), ms, s, MiB.
            limit: what it is compared with.
            against: the limit's samples.
            goal: for the ratio where there is a limit, else for the median itself.
            less: whether the goal is to stay below it; above it, otherwise.
        """
        if not samples:
            return
        value = statistics.median(samples)
        row: dict[str, Any] = {"what": what, "unit": unit, "value": value, "samples": list(samples)}
        judged = value
        if limit is not None and against:
            row |= {"limit": limit, "limit_value": statistics.median(against)}
            row["ratio"] = judged = value / row["limit_value"]
        elif limit is not None:
            goal = None  # nothing to compare with
        if goal is not None and self.judged:
            row |= {"goal": goal, "less": less, "met": judged <= goal if less else judged >= goal}
        self.rows.append(row)


def interleave(measures: Mapping[str, Measure], rounds: int, outcome: Outcome, warm: int = 1) -> dict[str, list[Any]]:
    """Do each once in every round, each round beginning with another one; what they returned, in order.

    The first `warm` rounds do not count. What raises `Skipped` or `Failed` is left out from then on, and the reason
    kept in the outcome.
    """
    found: dict[str, list[Any]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(warm + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            try:
                value = measures[name]()
            except (Skipped, Failed) as error:
                outcome.skipped[name] = str(error) if isinstance(error, Skipped) else f"failed: {error}"
                found[name].clear()
                names = [other for other in names if other != name]
            else:
                if turn >= warm:
                    found[name].append(value)
    return found


def best(samples: Mapping[str, Sequence[float]]) -> tuple[str | None, Sequence[float]]:
    """The name and the samples with the highest median."""
    there = {name: values for name, values in samples.items() if values}
    if not there:
        return None, ()
    name = max(there, key=lambda name: statistics.median(there[name]))
    return name, there[name]


def distribution(spent: list[float]) -> dict[str, Any]:
    """Percentiles, and a histogram: how many steps took less than each bound and more than the one before, in ms."""
    ordered = sorted(spent)
    found: dict[str, Any] = {
        name: ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share) - 1)]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))
    }
    bins = Counter(math.ceil(math.log(max(value, 1e-3), BIN)) for value in ordered)
    found |= {"steps": len(ordered), "mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return found | {"histogram": [[round(BIN**number, 5), count] for number, count in sorted(bins.items())]}
