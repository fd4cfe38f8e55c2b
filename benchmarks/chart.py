"""Charts, drawn from the JSON that a run wrote. matplotlib is imported here and nowhere else."""

import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

from benchmarks import table

COLOURS = ("#00796b", "#ef6c00", "#3949ab", "#c2185b", "#558b2f", "#6d4c41", "#0097a7", "#7b1fa2", "#fbc02d", "#78909c")
LIMIT, IDLE = "#b0bec5", "#455a64"
Case = dict[str, Any]


class NoMatplotlib(Exception):
    """There is no matplotlib; the message says how to get it."""


def draw(contents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what there is to draw; the files. Where a case is in several results, the last one counts.

    Raises `NoMatplotlib`.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("charts need matplotlib: python -m pip install matplotlib") from error
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "tensorfork",  # the same figures draw the same file
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
        }
    )
    cases = {case["case"]: case for content in contents for case in content["cases"] if case["rows"]}
    machine = table.machine(contents[-1]["machine"]).partition(", load")[0] if contents else ""
    if contents and contents[-1]["machine"]["gpus"]:
        machine = f"{len(contents[-1]['machine']['gpus'])} x {contents[-1]['machine']['gpus'][0]}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for where in ("cpu", "gpu"):
        here = [case for name, case in cases.items() if where in name]
        for name, chart in CHARTS.items():
            file = folder / f"{where}-{name}.svg"
            if chart(here, file, machine):
                drawn.append(file)
    return drawn


def speeds(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """A bar for every transfer, over a wider one for its limit."""
    rows = [
        (case["case"], row)
        for case in cases
        for row in case["rows"]
        if "transfer, " in row["what"] and row["unit"] == "GB/s"
    ]
    if not rows:
        return False
    figure, axes = _figure(len(rows), "GB/s (wide, grey: the limit measured beside it)", f"Transfers: {machine}")
    for at, (_, row) in enumerate(rows):
        axes.barh(at, row.get("limit_value", 0), height=0.8, color=LIMIT)
        colour = COLOURS[0 if "unverified" in row["what"] else 2]
        axes.barh(at, row["value"], height=0.45, color=colour)
        ratio = f" ({row['ratio']:.2f} of {row['limit']})" if "ratio" in row else ""
        axes.text(row["value"], at, f" {row['value']:.3g}{ratio}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{case}  {row['what']}" for case, row in rows], fontsize=7)
    return _save(figure, file)


def phases(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """Where the time of a cold fork goes."""
    bars = [
        (f"{case['case']}  {what.removeprefix('cold ')}, {how}", table.medians(forks))
        for case in cases
        for what, found in case["detail"].items()
        if what.startswith("cold ")
        for how, forks in found.items()
        if forks
    ]
    if not bars:
        return False
    figure, axes = _figure(len(bars), "ms", f"Whole cold forks, by phase: {machine}")
    lefts = [0.0] * len(bars)
    for phase, colour in zip(max((spent for _, spent in bars), key=len), cycle(COLOURS), strict=False):
        widths = [1e3 * spent.get(phase, 0.0) for _, spent in bars]
        axes.barh(range(len(bars)), widths, left=lefts, height=0.7, color=colour, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    figure.legend(fontsize=7, ncols=6, loc="outside lower center", frameon=False)
    return _save(figure, file)


def steps(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """How many of the seed's steps took longer than so much, idle and during forks. No settings: see `gentle`."""
    loads: dict[str, list[Case]] = {}
    for case in cases:
        if "steps" in case["detail"] and "," not in case["detail"]["transport"]:
            loads.setdefault(case["detail"]["load"], []).append(case)
    if not loads:
        return False
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(loads), figsize=(6 * len(loads), 4), squeeze=False)
    for axes, (load, found) in zip(panels[0], loads.items(), strict=True):
        for case, colour in zip(found, cycle(COLOURS), strict=False):
            for when, style in (("idle", ":"), ("forks", "-"), ("transfers", "--")):
                if when in case["detail"]["steps"]:
                    label = case["detail"]["transport"] if when == "forks" else None
                    axes.plot(*_tail(case["detail"]["steps"][when]["histogram"]), style, color=colour, label=label)
        axes.set(yscale="log", xlabel="step, ms", ylabel="share of steps that took longer")
        axes.set_title(f"{load}; dotted: idle, dashed: steps that met a transfer", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(f"The seed's steps during forks: {machine}", fontsize=9)
    return _save(figure, file)


def gentle(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """The speed of a transfer, against what it does to the seed's steps."""
    found = [
        case for case in cases if "transfers" in case["detail"].get("steps", ()) and case["detail"]["load"] != "llama"
    ]
    if len(found) < 2:
        return False
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for case in found:
        transport, steps = case["detail"]["transport"], case["detail"]["steps"]
        name, _, options = transport.partition(",")
        speed = statistics.median(one for forked in case["detail"]["forks"] for one in forked["transfers"])
        ratio = steps["transfers"]["p99"] / steps["idle"]["p99"]
        lines.setdefault(name, []).append((speed, ratio, options))
    for (name, points), colour, below in zip(lines.items(), cycle(COLOURS), cycle((-9, 3)), strict=False):
        points.sort()
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour, label=name)
        for x, y, options in points:
            axes.annotate(options or "default", (x, y), fontsize=6, xytext=(3, below), textcoords="offset points")
    axes.axhline(1.0, color=IDLE, linewidth=0.8, linestyle=":")
    axes.set(xlabel="GB/s of a transfer", ylabel="p99 of the steps that meet a transfer, to idle")
    axes.set_title(f"Speed against the seed's steps: {machine}", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    return _save(figure, file)


CHARTS: dict[str, Callable[[Sequence[Case], Path, str], bool]] = {
    "speeds": speeds,
    "phases": phases,
    "steps": steps,
    "gentle": gentle,
}


def _figure(bars: int, unit: str, title: str) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.24 * bars))
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    return figure, axes


def _tail(histogram: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """Bounds, and the share of what lies beyond each; without the last, beyond which there is nothing."""
    total = sum(count for _, count in histogram)
    below = list(accumulate(count for _, count in histogram))
    return [bound for bound, _ in histogram][:-1], [1 - count / total for count in below][:-1]


def _save(figure: Any, file: Path) -> bool:
    import matplotlib.pyplot as plt

    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True
