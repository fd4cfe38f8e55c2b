"""The plain values of a published model, as forks are told them: read again for each lease, in steps."""

import logging
import os
import threading
import time
from operator import is_
from typing import Any

from attrs import frozen

from tensorfork.model.kinds import Classifier
from tensorfork.model.value_encoding import HASH, Encoded, Encoder
from tensorfork.model.values import STEP, Values, contents_of, read_values
from tensorfork.model.walk import Visited, walk
from tensorfork.wire import tables

log = logging.getLogger("tensorfork")

LONG = 10_000
"""Entries that are compared in a row, in a fraction of a millisecond."""


@frozen(eq=False, repr=False)
class PackedValues:
    """Values as they travel; see `messages.Leased`."""

    pages: list[bytes]
    salt: bytes
    beyond: int


class PublishedValues:
    """The plain values of what was published.

    Args:
        visited: where they are; None for a mapping of tensors, which has none.
        fixed: whether they stay as they are now, as a snapshot's do. Then the model is not referred to any longer.
    """

    def __init__(self, visited: Visited | None, *, fixed: bool) -> None:
        self._visited = visited
        self._lock = threading.Lock()
        self._encoder = Encoder(os.urandom(HASH), _pause)
        self._classifier = Classifier()
        self._packed: PackedValues | None = None
        self._watched: list[tuple[Any, list[Any]]] | None = None
        """What was read, and what it had in it then; None where that does not show every change."""
        if visited is not None and fixed:
            self._packed = self._pack(read_values(visited))
            self._visited = None

    def packed(self) -> PackedValues | None:
        """The values as they are now; None if there are none to be told, or they cannot be read."""
        if self._visited is None:
            return self._packed
        with self._lock:
            if self._packed is None or not self._is_unchanged():
                self._packed = None
                try:
                    self._packed = self._read(self._visited)
                except Exception:
                    log.exception("the model's plain values cannot be read; forks do not compare them")
            return self._packed

    def _read(self, visited: Visited) -> PackedValues:
        values = self._read_visited(visited)
        if values.is_outdated:  # a list, say, has taken another's place since the model was walked
            model = next(one for path, one in visited.objects if not path)
            self._visited = visited = walk(model, visited.selection).visited or visited
            values = self._read_visited(visited)
        return self._pack(values)

    def _read_visited(self, visited: Visited) -> Values:
        watched = []
        for i, (_, one) in enumerate(visited.objects):
            watched.append((one, contents_of(one, self._classifier)))
            if i % STEP == STEP - 1:
                _pause()
        values = read_values(visited, _pause)
        self._watched = None if values.is_volatile else [*watched, *values.sets]
        return values

    def _pack(self, values: Values) -> PackedValues:
        encoded: list[Encoded] = []
        for start in range(0, len(values.values), STEP):
            encoded += map(self._encoder.encode, values.values[start : start + STEP])
            _pause()
        return PackedValues(tables.pack_values(values.names, encoded), self._encoder.salt, values.beyond)

    def _is_unchanged(self) -> bool:
        """Whether all that was read holds the same objects as then: plain values do not change themselves."""
        for i, (one, then) in enumerate(self._watched or ()):
            if i % STEP == STEP - 1:
                _pause()
            if not _are_same(contents_of(one, self._classifier), then):
                return False
        return self._watched is not None


def _are_same(now: list[Any], then: list[Any]) -> bool:
    """Whether two lists hold the same objects. Of long ones some are compared at a time."""
    if len(now) != len(then):
        return False
    if len(now) <= LONG:
        return all(map(is_, now, then))
    for start in range(0, len(now), LONG):
        if not all(map(is_, now[start : start + LONG], then[start : start + LONG])):
            return False
        _pause()
    return True


def _pause() -> None:
    """Let the engine's thread run, which otherwise waits for up to 5 ms."""
    time.sleep(0)
