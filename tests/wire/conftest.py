"""A seed that the tests of one module share."""

from collections.abc import Iterator

import pytest
from hostile import MUCH, Seed, model
from processes import Child, serve


@pytest.fixture(scope="module")
def running() -> Iterator[Seed]:
    with Child(serve, model) as child:
        seed = Seed(child)
        seed.serves()
        yield seed


@pytest.fixture
def seed(running: Seed) -> Iterator[Seed]:
    before = running.memory()
    yield running
    running.serves()
    assert running.memory() - before < MUCH
