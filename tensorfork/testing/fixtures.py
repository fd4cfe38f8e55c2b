"""How pytest runs the suite: its parameters and fixtures."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest

from tensorfork import Transport
from tensorfork.testing.harness import SAME_PROCESS, SPAWNED_PROCESS, Harness, Setup
from tensorfork.testing.helper_process import HelperProcess


def spawned_only(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the suite as one that needs the seed, or the fork, in a spawned process."""
    test.spawned_only = True  # type: ignore[attr-defined]  # read when the tests are generated
    return test


class SuiteFixtures:
    """The base of `TransportSuite`, which has these settings."""

    devices: ClassVar[Sequence[tuple[str, str]]]
    ways: ClassVar[Sequence[str]]
    seconds: ClassVar[float]

    def make(self) -> Transport:
        """See `TransportSuite.make`."""
        raise NotImplementedError(f"{type(self).__name__} must say how its transport is made")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for each pair of devices, within one process and from a spawned one."""
        if "harness" in metafunc.fixturenames:
            needs_spawned = hasattr(metafunc.function, "spawned_only")
            ways = [way for way in self.ways if way != SAME_PROCESS or not needs_spawned]
            setups = [Setup(way, *pair) for pair in self.devices for way in ways]
            nothing = pytest.param(None, marks=pytest.mark.skip(reason="needs a spawned process"), id="nowhere")
            metafunc.parametrize("setup", setups or [nothing], ids=str)

    @pytest.fixture(scope="class")
    @classmethod
    def helper_process(cls) -> Iterator[HelperProcess | None]:
        """The spawned process that the tests of a class share."""
        if SPAWNED_PROCESS not in cls.ways:
            yield None
            return
        helper_process = HelperProcess(cls)
        yield helper_process
        helper_process.close()

    @pytest.fixture
    def harness(self, helper_process: HelperProcess | None, setup: Setup) -> Harness:
        """Creates a test's seeds and leases."""
        return Harness(self, setup, helper_process if setup.way == SPAWNED_PROCESS else None)
