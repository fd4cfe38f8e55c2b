"""Running one test of the transport suite on a transport with a fault."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

import tensorfork
from tensorfork.testing import Fault, FaultyTransport, TransportSuite
from tensorfork.testing.faults import Job
from tensorfork.testing.harness import SAME_PROCESS, Harness, Setup
from tensorfork.transports.zeromq import ZeroMQ


class Broken(TransportSuite):
    """The suite on the transport that `transport` makes. pytest does not collect it, because of its name."""

    ways = (SAME_PROCESS,)
    big = 24 << 20
    seconds = 20.0
    short = 0.3
    under_way = 1.0
    transport: ClassVar[Callable[[], tensorfork.Transport]]

    def make(self) -> tensorfork.Transport:
        return type(self).transport()


@contextmanager
def harness_for(make: Callable[[], tensorfork.Transport], **settings: Any) -> Iterator[tuple[Broken, Harness]]:
    kind = type("BrokenOne", (Broken,), {"transport": staticmethod(make), **settings})
    suite = kind()
    yield suite, Harness(suite, Setup(SAME_PROCESS, "cpu", "cpu"), None)


def finds(make: Callable[[], tensorfork.Transport], test: Callable[..., None], message: str | None, *args: Any) -> None:
    """Check that a test of the suite fails for this transport, with this message."""
    with (
        harness_for(make) as (suite, harness),
        pytest.raises((AssertionError, pytest.fail.Exception, ExceptionGroup), match=message),
    ):
        test(suite, harness, *args)


def with_fault(fault: Callable[[], Fault]) -> Callable[[], tensorfork.Transport]:
    return lambda: FaultyTransport(ZeroMQ(), fault())


class Custom(Fault):
    """A fault that calls a function in place of the pull."""

    def __init__(self, pull: Callable[[Job], None]) -> None:
        self._pull = pull

    def pull(self, job: Job) -> None:
        self._pull(job)


def custom(pull: Callable[[Job], None]) -> Callable[[], tensorfork.Transport]:
    return with_fault(lambda: Custom(pull))
