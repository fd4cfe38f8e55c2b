"""The plain values beside the tensors: ours against the seed's, and what becomes of those that differ."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from attrs import frozen

from tensorfork.errors import ValueMismatch
from tensorfork.fork.background import BackgroundCall
from tensorfork.fork.rename import Namer, object_in_seed
from tensorfork.fork.value_differences import ABSENT, Difference, by_attribute, prepare_writes
from tensorfork.model.value_encoding import CHUNK, Encoded, Encoder, same
from tensorfork.model.value_policy import IGNORE, STRICT, ValuePolicy
from tensorfork.model.value_writes import ValueWrite
from tensorfork.model.values import Values, read_values
from tensorfork.model.walk import Visited
from tensorfork.report import ValueReport
from tensorfork.wire.tables import unpack_values

log = logging.getLogger("tensorfork")


@frozen(eq=False, repr=False)
class SeedValues:
    """The seed's values, as a lease brought them; see `messages.Leased`."""

    pages: Sequence[bytes]
    salt: bytes
    beyond: int


@frozen(eq=False, repr=False)
class ComparedValues:
    """What became of a comparison: the report, and the values that are to be written."""

    report: ValueReport
    writes: Sequence[ValueWrite]


class OurValues:
    """Our model's values, which are read once a fork, and what the caller wants to be done about them.

    Attributes:
        policy: that.
        compared: the outcome of the last comparison.
    """

    def __init__(self, visited: Visited, policy: ValuePolicy, name_of: Namer | None) -> None:
        self.policy, self._visited, self._name_of = policy, visited, name_of
        self.compared: ComparedValues | None = None
        self._read: Values | None = None
        self._names: Mapping[str, int] = {}
        """Of each value by its name in the seed: its index."""

    @classmethod
    def of(cls, visited: Visited | None, policy: ValuePolicy, name_of: Namer | None) -> "OurValues | None":
        """The values of a model that was walked; None for a mapping of tensors.

        `name_of` gives the seed's name for one of ours; None where they are the same. With it, values that only one
        side has are no difference: a wrapper has some of its own.
        """
        return None if visited is None else cls(visited, policy, name_of)

    def read(self) -> Values:
        """Our values. The first call reads them, in milliseconds."""
        if self._read is None:
            found = read_values(self._visited)
            self._names = {name: i for i, name in enumerate(map(self._name_in_seed, found.names)) if name is not None}
            self._read = found
        return self._read

    def _name_in_seed(self, name: str) -> str | None:
        if self._name_of is None:
            return name
        try:
            return object_in_seed(self._name_of, name)
        except (TypeError, ValueError):  # a function that knows the names of tensors alone
            return None

    @contextmanager
    def comparing(self, theirs: SeedValues | None, peer: str) -> Iterator[None]:
        """Compare the seed's values with ours: before the block is entered, or beside it if nothing depends on that.

        Raises as `compare` does; after the block, where it was done beside it. Without the seed's nothing is compared.
        """
        self.compared = None  # with those of an earlier lease
        if theirs is None:
            yield
            return
        if self.policy.differ == STRICT or self.policy.take:
            self.compare(theirs, peer)
            yield
            return
        try:
            comparison = BackgroundCall(lambda: self.compare(theirs, peer), "tensorfork-values")
        except RuntimeError:  # there are no more threads
            self.compare(theirs, peer)
            yield
            return
        try:
            yield
        finally:
            comparison.wait()
        comparison.result()

    def compare(self, packed: SeedValues, peer: str) -> None:
        """Compare the seed's values with ours.

        Raises `ValueMismatch` for differences that may not be, and for values that are to be taken and cannot;
        `ProtocolError` for what are no values.
        """
        ours, theirs = self.read(), unpack_values(packed.pages)
        different = list(self._different(theirs, packed))
        wanted = [one for one in different if self.policy.takes(one.name)]
        others = [one for one in different if not self.policy.takes(one.name)]
        unexpected = [one for one in others if not self.policy.expects(one.name)]
        writes = prepare_writes(wanted, peer)
        report = ValueReport(
            compared=len(theirs.keys() | self._names.keys()),
            different=() if self.policy.differ == IGNORE else by_attribute(unexpected),
            expected=len(others) - len(unexpected),
            taken=tuple(one.name for one in wanted),
            opaque=tuple(ours.opaque),
            not_looked_at=packed.beyond + ours.beyond,
        )
        if unexpected and self.policy.differ == STRICT:
            raise ValueMismatch(
                f'{peer}: {report}. Nothing was copied. Make them equal, or allow them with values="report" or a '
                "ValuePolicy, which can also take numbers over from the seed",
                names=[one.name for one in unexpected],
            )
        self.compared = ComparedValues(report, writes)

    def _different(self, theirs: Mapping[str, Encoded], packed: SeedValues) -> Iterator[Difference]:
        """What differs. What one side lacks does, if that has looked at all of its values, and names are the same."""
        ours, encode = self.read(), Encoder(packed.salt, _pause).encode
        count_ours = self._name_of is None and not packed.beyond
        count_theirs = self._name_of is None and not ours.beyond
        for i, (name, index) in enumerate(self._names.items()):
            if i % CHUNK == CHUNK - 1:
                _pause()
            value = ours.values[index]
            other: Any = theirs.get(name, ABSENT)
            if other is value or (type(other) is int is type(value) and other == value):
                continue  # most are, and this is all that they cost
            if count_ours if other is ABSENT else not same(other, encode(value)):
                yield Difference(ours.names[index], other, value, ours.places[index])
        if count_theirs:
            selects = self._visited.selection.selects
            for name, other in theirs.items():
                if name not in self._names and selects(name):
                    yield Difference(name, other, ABSENT, None)


def log_differences(report: ValueReport | None, peer: str) -> None:
    """Say once what differs."""
    if report is not None and report.different:
        log.warning(
            "%s: %s. Recompute what was made of tensors, or have the values taken over (docs/reliability.md)",
            peer,
            report,
        )


def _pause() -> None:
    """Let the other threads run: one of them begins copies."""
    time.sleep(0)
