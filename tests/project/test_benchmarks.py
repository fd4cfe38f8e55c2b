"""The benchmarks measure what they say, say why they do not, and leave nothing behind."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import cases, disturbance, imports, settings, table
from benchmarks.bench import Bench
from benchmarks.measure import Outcome, distribution, interleave
from benchmarks.process import ROOT, Failed, Lost, Skipped, Worker
from benchmarks.worker import models
from benchmarks.worker.state import WorkerState

pytestmark = pytest.mark.slow


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command, with the machine's GPUs hidden."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of one small run: a case that works here, and one that needs more GPUs than there are."""
    folder = tmp_path_factory.mktemp("results")
    done = run("quick-cpu", "gpu-60GB-nccl", "--rounds", "1", "--scale", "0.05", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transfer, unverified" in done.stdout
    return folder / "results.json"


def case_of(results: Path, name: str) -> dict[str, Any]:
    case: dict[str, Any] = next(one for one in json.loads(results.read_text())["cases"] if one["case"] == name)
    return case


def test_a_run_writes_speeds_limits_memory_and_phases(results: Path) -> None:
    written, case = json.loads(results.read_text()), case_of(results, "quick-cpu")
    rows = {row["what"]: row for row in case["rows"]}
    assert case["status"] == "done"
    assert case["skipped"] == {}
    assert case["detail"]["same_bytes"] is True
    for what in ("transfer, unverified", "transfer, verified", "TCP, 1 MiB reads", "memcpy"):
        assert 0.001 < rows[what]["value"] < 1000, what
    best = max(row["value"] for what, row in rows.items() if what.startswith("TCP"))
    assert rows["transfer, unverified"]["limit_value"] == best
    assert rows["transfer, unverified"]["ratio"] == pytest.approx(rows["transfer, unverified"]["value"] / best)
    assert abs(rows["memory added to the fork"]["value"]) < 64  # MiB; a process may also have less than before
    assert {"hello", "layout", "transfer", "verify"} <= set(case["detail"]["warm"]["verified"][0]["seconds"])
    assert written["machine"]["torch"]


def test_a_case_that_cannot_run_here_is_skipped_with_the_reason(results: Path) -> None:
    case = case_of(results, "gpu-60GB-nccl")
    assert case["status"] == "skipped"
    assert "needs 2 GPUs, there are 0" in case["why"]


def test_what_a_seed_bears_is_measured_beside_one_fork_and_nothing_fails(tmp_path: Path) -> None:
    names = ("load-forks", "load-unread")
    done = run(*names, "--rounds", "1", "--scale", "0.05", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        case = case_of(tmp_path / "results.json", name)
        rows = {row["what"]: row["value"] for row in case["rows"]}
        assert (case["status"], rows["forks that failed"]) == ("done", 0)
        assert rows["memory added to the seed"] < 64  # MiB
    assert rows["leases that are not read"] == 4
    assert rows["until all are cut off"] < 20


class FakeInterpreters(Bench):
    """Starts no process. Each import takes as many seconds as `seconds` says, for the modules that are imported."""

    def __init__(self, seconds: dict[str, list[float]], **options: Any) -> None:
        super().__init__({"gpus": []}, **options)
        self.seconds = {names: iter(values) for names, values in seconds.items()}
        self.log: list[str] = []

    def start(self, name: str, device: str, *, own_gpu: bool = False, env: Mapping[str, str] | None = None) -> Any:
        assert device == "cpu"
        assert env == {"PYTHONDONTWRITEBYTECODE": ""}
        return SimpleNamespace(name=name, close=lambda: self.log.append("close"))

    def ask(self, worker: Any, call: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        assert call == "imports.import_modules"
        names = " ".join(arguments["names"])
        self.log.append(names)
        return {"seconds": next(self.seconds[names]), "modules": len(names)}


def test_imports_are_timed_in_fresh_interpreters_beside_the_goal_and_the_dependencies() -> None:
    dependencies, outcome = "attrs msgpack zmq", Outcome()
    bench = FakeInterpreters({"tensorfork": [9.0, 0.2, 0.4], dependencies: [9.0, 0.1, 0.05]}, rounds=2)
    imports.case(bench, outcome)
    in_order = ["tensorfork", dependencies, dependencies, "tensorfork", "tensorfork", dependencies]
    assert bench.log == [entry for names in in_order for entry in (names, "close")]
    to_goal, to_dependencies, alone = outcome.rows
    assert to_goal["samples"] == to_dependencies["samples"] == [200.0, 400.0]  # without the round that writes bytecode
    assert (to_goal["value"], to_goal["limit_value"], to_goal["ratio"]) == pytest.approx((300, 100, 3))
    assert to_goal["met"] is False
    assert (to_dependencies["limit_value"], to_dependencies["ratio"]) == pytest.approx((75, 4))
    assert alone["value"] == pytest.approx(75)


def test_modules_that_are_imported_already_are_not_timed() -> None:
    with Worker("importer") as worker:
        first = worker.ask("imports.import_modules", names=imports.MODULES["tensorfork"], timeout=60)
        assert first["seconds"] > 0
        assert first["modules"] > 5
        for names in imports.MODULES.values():
            with pytest.raises(Failed, match=f"imported already: {', '.join(names)}"):
                worker.ask("imports.import_modules", names=["wave", *names], timeout=60)


def test_publishes_and_forks_are_compared_with_process_settings_forbidden_and_allowed() -> None:
    outcome = Outcome()
    with ExitStack() as stack:
        bench = Bench({"gpus": []}, rounds=2, cold=1, stack=stack)
        settings.case(bench, outcome, shape="50x4KiB", transport="zeromq")
    assert outcome.skipped == {}
    rows = {row["what"]: row for row in outcome.rows}
    for what, samples in (("publish", 2), ("whole, cold, verified", 1)):
        forbidden, allowed = rows[f"{what}, settings forbidden"], rows[f"{what}, settings allowed"]
        assert len(forbidden["samples"]) == len(allowed["samples"]) == samples
        assert forbidden["limit_value"] == allowed["value"] > 0
        assert forbidden["ratio"] == pytest.approx(forbidden["value"] / allowed["value"])
    forks = outcome.detail["cold into arena"]
    assert list(forks) == ["settings allowed", "settings forbidden"]
    for (fork,) in forks.values():
        assert (fork["verified"], fork["transport"], fork["nbytes"]) == (True, "zeromq", 50 * 4096)


def test_a_worker_in_which_process_settings_are_not_as_they_should_be_is_a_failure() -> None:
    bench = Bench({"gpus": []})
    with Worker("strict", env=settings.ENVIRONMENTS["forbidden"]) as worker:
        settings.check_mode(bench, worker, "forbidden")
        with pytest.raises(Failed, match="did not make process-wide settings allowed"):
            settings.check_mode(bench, worker, "allowed")


def test_charts_are_drawn_from_the_json_or_the_remedy_is_named(results: Path, tmp_path: Path) -> None:
    drawn = run("chart", str(results), "-o", str(tmp_path))
    if importlib.util.find_spec("matplotlib") is None:
        assert drawn.returncode == 2
        assert "pip install matplotlib" in drawn.stderr
    else:
        assert drawn.returncode == 0, drawn.stderr
        assert "<svg" in (tmp_path / "cpu-speeds.svg").read_text()


def test_a_worker_that_hangs_is_ended_and_its_stacks_are_shown() -> None:
    with Worker("sleeper") as worker:
        worker.ask("interpreter.sleep", seconds=0, timeout=60)
        with pytest.raises(Lost, match=r"(?s)hung for 0\.2 s.*in sleep"):
            worker.ask("interpreter.sleep", seconds=60, timeout=0.2)
        assert worker._process.poll() is not None


def test_a_call_that_raises_leaves_the_worker_usable() -> None:
    with Worker("clumsy") as worker:
        with pytest.raises(Failed, match="'no' is no shape"):
            worker.ask("models.build", shape="no", placement="placed", timeout=60)
        assert worker.ask("models.build", shape="3x64KiB", placement="placed", timeout=60)["tensors"] == 3


def test_rounds_are_interleaved_and_what_is_skipped_is_named_once() -> None:
    calls: list[str] = []
    outcome = Outcome()

    def absent() -> float:
        calls.append("absent")
        raise Skipped("not here")

    found = interleave({"a": lambda: calls.append("a"), "absent": absent, "b": lambda: calls.append("b")}, 2, outcome)
    assert calls == ["a", "absent", "b", "b", "a", "a", "b"]
    assert [len(samples) for samples in found.values()] == [2, 0, 2]
    assert outcome.skipped == {"absent": "not here"}


@pytest.mark.parametrize(("less", "value", "met"), [(False, 0.9, False), (False, 1.1, True), (True, 0.9, True)])
def test_a_goal_is_for_the_ratio_of_medians(less: bool, value: float, met: bool) -> None:
    outcome = Outcome()
    samples, against = [0.0, 2 * value, 99.0], [1.0, 2.0, 50.0]
    outcome.add("speed", samples, "GB/s", limit="limit", against=against, goal=1.0, less=less)
    assert outcome.rows[0]["ratio"] == pytest.approx(value)
    assert outcome.rows[0]["met"] is met


def test_a_distribution_has_the_percentiles_and_counts_every_step() -> None:
    found = distribution([float(n) for n in range(1, 1001)])
    assert (found["p50"], found["p99"], found["p99.9"], found["max"]) == (500, 990, 999, 1000)
    assert sum(count for _, count in found["histogram"]) == 1000


@pytest.mark.parametrize(
    ("word", "tensors", "nbytes"),
    [
        ("llama", 291, 16_060_522_496),
        ("experts", 10_000, 15_728_640_000),
        ("1GiB/4", 4, 1 << 30),
        ("3x64KiB", 3, 196_608),
    ],
)
def test_shapes_are_what_their_names_say(word: str, tensors: int, nbytes: int) -> None:
    state = WorkerState("shape", "cpu")
    assert models.build(state, shape=word, placement="meta") == {"tensors": tensors, "nbytes": nbytes}


def test_an_arena_is_one_allocation_with_every_tensor_filled() -> None:
    state = WorkerState("shape", "cpu")
    models.build(state, shape="5x64KiB", placement="arena", fill=True)
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.tensors.values()}) == 1
    assert len(set(models.sums(state))) == 5


@pytest.mark.parametrize(
    ("word", "scaled"),
    [("llama", "llama*0.1"), ("llama*0.5", "llama*0.05"), ("16GB/1", "1.6GB/1"), ("300x1MiB", "30x1MiB")],
)
def test_a_scale_makes_every_model_smaller(word: str, scaled: str) -> None:
    assert Bench({"gpus": []}, scale=0.1).shape(word) == scaled


def test_every_case_has_a_name_of_its_own_and_can_be_selected() -> None:
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    assert [case.name for case in cases.select(["cpu-1GiB", "cpu-16*"])] == ["cpu-1GiB", "cpu-16MiB"]
    with pytest.raises(ValueError, match="'nothing' names no case"):
        cases.select(["nothing"])


def test_the_table_says_what_was_missed() -> None:
    outcome = Outcome(skipped={"NCCL send": "one GPU"})
    outcome.add("transfer", [0.5], "GB/s", limit="raw copy", against=[1.0], goal=0.9)
    result = {"case": "x", "status": "done", "why": "", "rows": outcome.rows, "detail": {}, "skipped": outcome.skipped}
    text = table.render([result], markdown=True)
    assert "| x | transfer | 0.5 GB/s | raw copy: 1 | 0.50 | ≥ 0.9 | MISSED |" in text
    assert "x: without NCCL send: one GPU" in text
    assert "missed:\n  x: transfer" in table.summary([result])


def test_a_step_meets_a_transfer_if_bytes_move_for_some_of_it() -> None:
    steps = [(10.0, 1.0), (10.001, 2.0), (10.003, 3.0), (10.006, 4.0)]
    assert list(disturbance.overlapping(steps, [(10.0005, 10.0007), (10.0055, 10.0061)])) == [1.0, 3.0, 4.0]
    assert list(disturbance.overlapping(steps, [(9.0, 9.9), (10.2, 11.0)])) == []
    assert list(disturbance.overlapping(steps, [])) == []
