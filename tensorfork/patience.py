"""Loops over what a peer announced look, every so often, whether they should go on: it may be more than it seems."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

Check = Callable[[], object]
"""Raises where work must not go on: its deadline has passed, or it was cancelled."""

STEP = 256
"""Items between two looks: some tenths of a millisecond in most loops."""


def unchecked() -> None:
    """The `Check` of what is our own: it goes on."""


def looking(items: Iterable[T], check: Check, step: int = STEP) -> Iterator[T]:
    """The items. `check` is called before the first of them, and after every `step`."""
    iterator = iter(items)
    while True:
        check()
        some = list(islice(iterator, step))
        yield from some
        if len(some) < step:
            return
