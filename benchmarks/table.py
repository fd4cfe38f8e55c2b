"""Results as text: for a terminal, or as Markdown."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

HEAD = ("case", "what", "value", "limit", "ratio", "goal", "")


def render(results: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """A table with every row of the cases, and below it what was skipped, what failed, and cold forks by phase."""
    lines = [HEAD, *(line for result in results for line in _lines(result))]
    text = _markdown(lines) if markdown else _columns(lines)
    notes = [note for result in results for note in _notes(result)]
    if len(lines) == 1:
        return "\n".join(notes)
    return "\n".join([*text, *([""] if notes and markdown else []), *notes])


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in result["rows"]:
        limit = f"{row['limit']}: {_number(row['limit_value'])}" if "limit" in row else ""
        goal = f"{'≤' if row['less'] else '≥'} {row['goal']:g}" if "goal" in row else ""
        met = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        yield result["case"], row["what"], f"{_number(row['value'])} {row['unit']}".strip(), limit, ratio, goal, met


def _notes(result: dict[str, Any]) -> Iterator[str]:
    name = result["case"]
    if result["status"] != "done":
        yield f"{name}: {result['status']}: {result['why']}"
    for what, why in result["skipped"].items():
        yield f"{name}: without {what}: {why}"
    for what, forks in result["detail"].items():
        if what.startswith("cold"):
            for how, found in forks.items():
                if found:
                    yield f"{name}: {what}, {how}: {phases(found)}"


def phases(forks: Sequence[dict[str, Any]]) -> str:
    """The median of every phase, and of the time outside them, as text."""
    return ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians(forks).items())


def medians(forks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of every phase, and of the time outside them."""
    phases = {name: statistics.median(one["seconds"].get(name, 0.0) for one in forks) for name in forks[0]["seconds"]}
    phases["outside"] = statistics.median(one["whole"] - sum(one["seconds"].values()) for one in forks)
    return phases


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.0005 else "0"


def _columns(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _markdown(lines: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [rows[0], "|" + "---|" * len(HEAD), *rows[1:]]


def machine(description: dict[str, Any]) -> str:
    """The machine that the figures were measured on, in a line."""
    names = description["gpus"]
    gpus = f"{len(names)} x {names[0]}" if names else "no GPU"
    return (
        f"{description['processor']}, {description['cores']} cores, {description['memory_gb']} GB, load "
        f"{description['load']:.1f}; {gpus}; Python {description['python']}, torch {description['torch']}"
    )


def summary(results: Sequence[dict[str, Any]]) -> str:
    """How many cases ran and how many goals were met, and the goals that were missed."""
    goals = [(result["case"], row) for result in results for row in result["rows"] if "met" in row]
    missed = [f"  {case}: {row['what']}" for case, row in goals if not row["met"]]
    count = Counter(result["status"] for result in results)
    statuses = ", ".join(f"{number} {status}" for status, number in count.items())
    met = f"{len(results)} cases: {statuses}; {len(goals) - len(missed)} of {len(goals)} goals met"
    return "\n".join([met, *(["missed:", *missed] if missed else [])])
