"""The report of a fork, and the stopwatch that measures its phases."""

import time
from collections.abc import Mapping, Sequence

from attrs import field, frozen

from tensorfork.lineage import Version

PHASES = (
    "survey",
    "resolve",
    "hello",
    "layout",
    "match",
    "allocate",
    "lease",
    "open",
    "transfer",
    "verify",
    "close",
    "install",
)
"""In order, from describing our own model (survey) to giving meta tensors their memory (install)."""


@frozen
class DifferentValues:
    """Plain values of one attribute that are not the seed's.

    Attributes:
        attribute: the last part of their names, without indices: ``k_scale_float``.
        names: of all of them.
        seed: the first one in the seed, in words. What is no number travels as a hash, and is not known.
        here: the first one here, in words.
    """

    attribute: str
    names: tuple[str, ...]
    seed: str
    here: str

    def __str__(self) -> str:
        values = "1 value" if len(self.names) == 1 else f"{len(self.names):,} values, such as"
        return f"{self.attribute}: {values} {self.names[0]}: {self.seed} in the seed, {self.here} here"


@frozen(repr=False)
class ValueReport:
    """How the model's plain values (numbers, texts, names of classes and functions) compare with the seed's.

    The seed's are those of when it granted the lease, or took the snapshot.

    Attributes:
        compared: how many there are on either side.
        different: those that differ, or that only one side has, by attribute, unless they differ rightly.
        expected: how many differ rightly.
        taken: names of those that have become the seed's.
        opaque: what could not be looked into here, a hundred at most: objects of other libraries, large arrays.
        not_looked_at: values beyond the first 10,000 of the model, in the seed and here.
    """

    compared: int
    different: Sequence[DifferentValues] = ()
    expected: int = 0
    taken: Sequence[str] = ()
    opaque: Sequence[str] = ()
    not_looked_at: int = 0

    @property
    def phrase(self) -> str:
        """What differs and what was not looked at, in a few words; empty if there is nothing to say."""
        said = []
        if self.different:
            groups = [f"{len(one.names):,} {one.attribute}" for one in self.different[:5]]
            said.append("plain values differ: " + ", ".join(groups) + ", ..." * (len(self.different) > 5))
        if self.taken:
            said.append(f"{len(self.taken):,} plain values taken")
        if self.not_looked_at:
            said.append(f"{self.not_looked_at:,} plain values not looked at")
        return "; ".join(said)

    def __str__(self) -> str:
        total = sum(len(one.names) for one in self.different)
        if not total:
            return f"none of {self.compared:,} plain values differs from the seed's unexpectedly"
        shown = "; ".join(map(str, self.different[:10]))
        more = f"; and {len(self.different) - 10:,} other attributes" if len(self.different) > 10 else ""
        return f"{total:,} of {self.compared:,} plain values are not the seed's: {shown}{more}"

    __repr__ = __str__


@frozen(repr=False)
class ForkReport:
    """What happened in one fork. Prints as one line.

    Attributes:
        peer: the seed's address.
        transport: the name of the transport that moved the bytes.
        fabric: the network or bus that they were moved over, such as tcp or nvlink.
        tensors: names filled, ties included.
        nbytes: bytes moved.
        generation: the seed's generation at which all bytes were read.
        seconds: time spent in each of PHASES.
        verified: whether every tensor's digest was compared with the seed's.
        restarts: how often the fork began again because the seed changed.
        passed_over: transports that were not used, each with the reason.
        not_compared: checks that were skipped: "identity" and "rank" if they were not given here, "digests" without
            verification, "values" if they are ignored, or if the seed published a mapping of tensors.
        left_out: tensors, of ours and the seed's, that our selection leaves out; ours are unchanged.
        left_out_by_seed: tensors that the seed has and did not publish.
        version: which weights these are; its `content` is known where digests were compared.
        values: how the plain values beside the tensors compare; None where they were not compared.
        trace: the fork's trace id, as 32 hexadecimal digits, which the seed's log names too.
        rate_limit: bytes a second that the seed let all its forks have together; None if it has no limit.
    """

    peer: str
    transport: str
    fabric: str
    tensors: int
    nbytes: int
    generation: int
    seconds: Mapping[str, float]
    verified: bool
    restarts: int = 0
    passed_over: Mapping[str, str] = field(factory=dict)
    not_compared: Sequence[str] = ()
    left_out: Sequence[str] = ()
    left_out_by_seed: Sequence[str] = ()
    version: Version | None = None
    values: ValueReport | None = None
    trace: str = ""
    rate_limit: float | None = None

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def gbps(self) -> float:
        """Speed of the transfer alone, in GB/s (1e9 bytes a second)."""
        spent = self.seconds.get("transfer", 0.0)
        return self.nbytes / spent / 1e9 if spent else 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {_duration(self.seconds[name])}" for name in PHASES if name in self.seconds)
        restarts = f", {self.restarts} restarts" if self.restarts else ""
        checked = "verified" if self.verified else "NOT verified"
        skipped = [check for check in self.not_compared if check != "digests"]
        checked += f"; not compared: {', '.join(skipped)}" if skipped else ""
        if self.left_out or self.left_out_by_seed:
            checked += f"; left out: {len(self.left_out):,} here, {len(self.left_out_by_seed):,} by the seed"
        checked += f"; version {self.version.label}" if self.version and self.version.label else ""
        checked += f"; {self.values.phrase}" if self.values is not None and self.values.phrase else ""
        moved = f"{self.tensors:,} tensors ({_size(self.nbytes)})"
        return (
            f"forked {moved} from {self.peer} over {self.transport}/{self.fabric} "
            f"in {_duration(self.total)} ({self.gbps:.2f} GB/s; {phases}); {checked}{restarts}"
        )

    __repr__ = __str__


class Stopwatch:
    """Adds up the time spent in named phases, one at a time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name: str | None = None
        self._since = 0.0

    def enter(self, name: str | None) -> None:
        """End the current phase, and begin this one."""
        now = time.perf_counter()
        if self._name is not None:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now

    def stop(self) -> Mapping[str, float]:
        """End the current phase; return the seconds of each."""
        self.enter(None)
        return self._seconds


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"
