"""What `import tensorfork` takes in an interpreter that has imported torch."""

from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Measure, Outcome, interleave

GOAL_MS = 100.0
MODULES = {"tensorfork": ["tensorfork"], "its dependencies": ["attrs", "msgpack", "zmq"]}
"""What is imported, each in interpreters of its own. The dependencies are all but torch."""
WRITE_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}
"""So that the warm-up round compiles the modules, and no other round does."""


def case(bench: Bench, outcome: Outcome) -> None:
    """Import tensorfork behind torch, each time in a fresh interpreter; beside it, its dependencies alone."""

    def importing(what: str) -> Measure:
        def measure() -> dict[str, float]:
            worker = bench.start(what, "cpu", env=WRITE_BYTECODE)
            imported: dict[str, float] = bench.ask(
                worker, "imports.import_modules", timeout=START_TIMEOUT, names=MODULES[what]
            )
            worker.close()
            return imported

        return measure

    values = interleave({what: importing(what) for what in MODULES}, bench.rounds, outcome)
    ours, dependencies = ([1e3 * one["seconds"] for one in values[what]] for what in MODULES)
    outcome.detail["modules"] = {what: found[0]["modules"] for what, found in values.items() if found}
    outcome.add("import tensorfork, behind torch", ours, "ms", limit="goal", against=[GOAL_MS], goal=1.0, less=True)
    outcome.add("the same, to its dependencies", ours, "ms", limit="its dependencies alone", against=dependencies)
    outcome.add("import its dependencies, behind torch", dependencies, "ms")
