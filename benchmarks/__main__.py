"""python -m benchmarks: measure tensorfork beside the limits of the machine it runs on."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import cases, table
from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Outcome
from benchmarks.process import Failed, Lost, Skipped, Worker

OUT = Path("build/benchmarks")
EPILOG = """
other commands:
  python -m benchmarks list                               every case, and the groups it is in
  python -m benchmarks chart RESULTS.json... -o FOLDER    draw charts (needs matplotlib)
  python -m benchmarks table RESULTS.json... [--markdown] print the table again
"""


def main(arguments: list[str]) -> int:
    """Run the command; the exit status, which is 1 when a case failed."""
    commands = {"list": _list, "chart": _chart, "table": _table}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that workers are closed
    with Worker("machine") as worker:
        machine = worker.ask("machine.describe", timeout=START_TIMEOUT)
    names = options.cases or ["cpu", *(["gpu"] if machine["gpus"] else [])]
    try:
        selected = cases.select(names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    base = Bench(
        machine=machine,
        cold=options.cold,
        seconds=options.seconds,
        scale=options.scale,
        timeout=options.timeout,
        isolate=options.isolate,
    )
    start = time.monotonic()
    file = options.out / f"{options.name}.json"
    written = {"machine": machine, "began": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "arguments": arguments}
    results: list[dict[str, Any]] = []
    print(table.machine(machine), flush=True)
    for case in selected:
        remaining = options.budget - (time.monotonic() - start)
        if remaining <= 0:
            results.append(_result(case, Outcome(), "not started", "the budget is spent", 0.0))
            continue
        results.append(_run_case(base, case, options.rounds, min(remaining, options.case_timeout)))
        print(table.render(results[-1:]), end="\n\n", flush=True)
        _write(file, {**written, "cases": results})
    print(table.summary(results))
    print(f"written: {file}")
    return int(any(result["status"] == "failed" for result in results))


def _run_case(base: Bench, case: cases.Case, rounds: int | None, seconds: float) -> dict[str, Any]:
    """Run one case, for so many seconds at most; its result, even where it fails."""
    outcome, start = Outcome(judged=base.scale * case.scale == 1), time.monotonic()
    status, why = "done", ""
    if case.gpus > base.gpus:
        return _result(case, outcome, "skipped", f"needs {case.gpus} GPUs, there are {base.gpus}", 0.0)
    with ExitStack() as stack:
        bench = replace(
            base,
            stack=stack,
            rounds=rounds or case.rounds,
            on_gpu=case.gpus > 0,
            scale=base.scale * case.scale,
            deadline=start + seconds,
        )
        try:
            case.run(bench, outcome)
        except Skipped as error:
            status, why = "skipped", str(error)
        except (Failed, Lost) as error:
            late = time.monotonic() >= bench.deadline
            status, why = ("cut off", "its time was over") if late else ("failed", str(error))
        except Exception:  # a bug in one case must not keep the others from running
            status, why = "failed", traceback.format_exc()
    return _result(case, outcome, status, why, time.monotonic() - start)


def _result(case: cases.Case, outcome: Outcome, status: str, why: str, seconds: float) -> dict[str, Any]:
    return {
        "case": case.name,
        "groups": sorted(case.groups),
        "status": status,
        "why": why,
        "seconds": round(seconds, 1),
        "load": os.getloadavg()[0],
        "rows": outcome.rows,
        "detail": outcome.detail,
        "skipped": outcome.skipped,
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step, so that a run that is cut off leaves the cases that it had finished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(file)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", help="names, patterns or groups; by default all that this machine can do")
    add("--out", type=Path, default=OUT, help="folder of the JSON (default: %(default)s)")
    add("--name", default="results", help="name of the JSON file, without .json")
    add("--rounds", type=int, help="interleaved rounds (default: 5; imports: 7)")
    add("--cold", type=int, default=3, help="fresh processes for each kind of cold fork (default: %(default)s)")
    add("--seconds", type=float, default=8.0, help="of steps in each phase of a disturbance (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="factor for the models' sizes (default: %(default)s)")
    add("--isolate", action="store_true", help="the seed and the fork each see one GPU only")
    add(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which no case is started and the running one is cut off",
    )
    add("--timeout", type=float, default=120.0, help="seconds of any one step (default: %(default)s)")
    add("--case-timeout", type=float, default=600.0, help="seconds of one case (default: %(default)s)")
    return parser.parse_args(arguments)


def _list(arguments: list[str]) -> int:
    for case in cases.cases():
        print(f"{case.name:45} {','.join(sorted(case.groups)):32} {case.about}")
    return 0


def _read(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in files]


def _table(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks table")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    for content in _read(options.results):
        print(table.machine(content["machine"]))
        print(table.render(content["cases"], markdown=options.markdown))
    return 0


def _chart(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks chart")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    from benchmarks import chart

    try:
        drawn = chart.draw(_read(options.results), options.out)
    except chart.NoMatplotlib as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, drawn)) or "nothing in there to draw")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
