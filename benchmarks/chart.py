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
    """matplotlib is not installed; the message says how to install it."""


def draw(contents: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every chart that these results have figures for; the files. Of a case in several results, the last counts.

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
    files = []
    for device in ("cpu", "gpu"):
        selected = [case for name, case in cases.items() if device in name]
        for name, chart in CHARTS.items():
            file = folder / f"{device}-{name}.svg"
            if chart(selected, file, machine):
                files.append(file)
    return files


def speeds(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """A bar for every transfer, over a wider one for its limit; whether there was any."""
    rows = [
        (case["case"], row)
        for case in cases
        for row in case["rows"]
        if "transfer, " in row["what"] and row["unit"] == "GB/s"
    ]
    if not rows:
        return False
    figure, axes = _figure(len(rows), "GB/s (wide, grey: the limit measured beside it)", f"Transfers: {machine}")
    for y, (_, row) in enumerate(rows):
        axes.barh(y, row.get("limit_value", 0), height=0.8, color=LIMIT)
        colour = COLOURS[0 if "unverified" in row["what"] else 2]
        axes.barh(y, row["value"], height=0.45, color=colour)
        ratio = f" ({row['ratio']:.2f} of {row['limit']})" if "ratio" in row else ""
        axes.text(row["value"], y, f" {row['value']:.3g}{ratio}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{case}  {row['what']}" for case, row in rows], fontsize=7)
    return _save(figure, file)


def phases(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """The phases of cold forks; whether there was any."""
    bars = [
        (f"{case['case']}  {what.removeprefix('cold ')}, {mode}", table.medians(forks))
        for case in cases
        for what, modes in case["detail"].items()
        if what.startswith("cold ")
        for mode, forks in modes.items()
        if forks
    ]
    if not bars:
        return False
    figure, axes = _figure(len(bars), "ms", f"Whole cold forks, by phase: {machine}")
    lefts = [0.0] * len(bars)
    for phase, colour in zip(max((seconds for _, seconds in bars), key=len), cycle(COLOURS), strict=False):
        widths = [1e3 * seconds.get(phase, 0.0) for _, seconds in bars]
        axes.barh(range(len(bars)), widths, left=lefts, height=0.7, color=colour, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    figure.legend(fontsize=7, ncols=6, loc="outside lower center", frameon=False)
    return _save(figure, file)


def steps(cases: Sequence[Case], file: Path, machine: str) -> bool:
    """The share of the seed's steps that took longer than x ms, idle and during forks; for transports as they are."""
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
    """The speed of transfers against what they do to the seed's steps, by transport and its options."""
    selected = [
        case for case in cases if "transfers" in case["detail"].get("steps", ()) and case["detail"]["load"] != "llama"
    ]
    if len(selected) < 2:
        return False
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for case in selected:
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
    """The bounds but the last, and the share of the steps that lie above each."""
    total = sum(count for _, count in histogram)
    below = list(accumulate(count for _, count in histogram))
    return [bound for bound, _ in histogram][:-1], [1 - count / total for count in below][:-1]


def _save(figure: Any, file: Path) -> bool:
    import matplotlib.pyplot as plt

    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True
