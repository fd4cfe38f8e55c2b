"""Seeds in this process."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tensorfork


@pytest.fixture
def seed_of() -> Iterator[Callable[[Any], tensorfork.Seed]]:
    """Publishes models in this process, for one test."""
    with contextlib.ExitStack() as stack:
        yield lambda model: stack.enter_context(tensorfork.publish(model))
