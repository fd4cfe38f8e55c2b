"""A run that skipped tests for want of system libraries ends with the command that changes that."""

import os

import pytest
from missing_libraries import line_about

LIBRARIES = (
    "Skipped: needs Mooncake: Mooncake's TransferEngine cannot be imported: libibverbs.so.1: cannot open shared object "
    "file: No such file or directory. Install what it links against: apt-get install -y libibverbs1 libnuma1"
)
WHEEL = "needs Mooncake: Mooncake's TransferEngine is not installed: pip install 'tensorfork[transfer-engine-cpu]'"
GPUS = "Skipped: needs 2 CUDA devices; torch finds none"


@pytest.mark.parametrize(("user", "command"), [(0, "apt-get install"), (1000, "sudo apt-get install")])
def test_the_tests_are_counted_and_the_command_is_the_user_s(
    user: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: user)
    line = line_about([LIBRARIES, GPUS, LIBRARIES])
    assert line.startswith("2 tests were skipped")
    assert line.endswith(f": {command} -y libibverbs1 libnuma1")


def test_a_wheel_that_is_missing_is_named() -> None:
    assert line_about([WHEEL]).endswith("pip install 'tensorfork[transfer-engine-cpu]'")


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert line_about([]) == line_about([GPUS]) == ""
