"""Interleaved rounds, medians, ratios and goals."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.process import Failed, Skipped

Measure = Callable[[], Any]
BIN = 1.01
"""Upper bound of a histogram's bin, relative to the one before."""


@dataclass
class Outcome:
    """What a case has measured so far; it is kept when the case fails later.

    Attributes:
        rows: lines of the table; see `add`.
        detail: what else goes into the JSON, such as phases and distributions.
        skipped: what could not be measured, and why.
        judged: whether goals are judged: only for the model size that they were set for.
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
        """Add a line: the median of the samples and, where there is a limit, its ratio to the limit's median.

        Args:
            what: what was measured.
            samples: one value a round; without any, no line is added.
            unit: GB/s (1e9 bytes a second), ms, s, MiB.
            limit: the name of what it is compared with.
            against: the limit's samples.
            goal: for the ratio where there is a limit, and else for the median.
            less: whether the goal is an upper bound rather than a lower one.
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


def interleave(
    measures: Mapping[str, Measure], rounds: int, outcome: Outcome, warm_up: int = 1
) -> dict[str, list[Any]]:
    """Call each measure once a round, in an order that is rotated by one from round to round; their return values.

    The first `warm_up` rounds are not returned. A measure that raises `Skipped` or `Failed` is not called again; it
    has no values then, and the reason goes to `outcome.skipped`.
    """
    values: dict[str, list[Any]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(warm_up + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)] if names else []:
            try:
                value = measures[name]()
            except (Skipped, Failed) as error:
                outcome.skipped[name] = str(error) if isinstance(error, Skipped) else f"failed: {error}"
                values[name].clear()
                names = [other for other in names if other != name]
            else:
                if number >= warm_up:
                    values[name].append(value)
    return values


def best(samples: Mapping[str, Sequence[float]]) -> tuple[str | None, Sequence[float]]:
    """The name and the samples with the highest median; None and no samples where there are none."""
    present = {name: values for name, values in samples.items() if values}
    if not present:
        return None, ()
    name = max(present, key=lambda name: statistics.median(present[name]))
    return name, present[name]


def distribution(durations: list[float]) -> dict[str, Any]:
    """Percentiles in ms, and a histogram: how many steps took up to each bound and more than the one before it."""
    ordered = sorted(durations)
    percentiles: dict[str, Any] = {
        name: ordered[min(len(ordered) - 1, math.ceil(len(ordered) * share) - 1)]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))
    }
    bins = Counter(math.ceil(math.log(max(value, 1e-3), BIN)) for value in ordered)
    percentiles |= {"steps": len(ordered), "mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return percentiles | {"histogram": [[round(BIN**number, 5), count] for number, count in sorted(bins.items())]}
