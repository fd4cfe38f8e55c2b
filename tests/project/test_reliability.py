"""docs/reliability.md says which test keeps each promise; they are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(\w+\.py)::(\w+)`", TEXT)))


def test_every_promise_names_a_test() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \|$", TEXT.split("### Not yet")[0], re.MULTILINE)
    kept = {promise: tests for promise, tests in rows if promise != "promise"}
    assert len(kept) > 20
    assert all("::" in tests for tests in kept.values())


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_a_test_that_keeps_a_promise_is_there(file: str, test: str) -> None:
    folder = ROOT / ("tensorfork/testing" if file == "suite.py" else "tests")
    (path,) = folder.rglob(file)
    assert re.search(rf"^ *def {test}\(", path.read_text(), re.MULTILINE)
