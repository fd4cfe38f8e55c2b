"""What a fork says of itself afterwards, and the clock it is timed with."""

import time
from collections.abc import Mapping, Sequence

from attrs import field, frozen

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
"""From a look at our own model to the meta tensors' taking their memory."""


@frozen(repr=False)
class ForkReport:
    """What happened in one fork. Prints as one line.

    Attributes:
        peer: the seed's address.
        transport: the name of the transport that moved the bytes.
        fabric: what they travelled over, such as tcp or nvlink.
        tensors: names filled, ties included.
        nbytes: bytes moved.
        generation: the seed's generation that all of them are of.
        seconds: time spent in each of PHASES.
        verified: whether every tensor's digest was compared with the seed's.
        restarts: times the fork began again because the seed changed.
        passed_over: transports that were not used, each with the reason.
        not_compared: what the two sides were not compared by: "identity" and "rank" where they were not given here,
            "digests" without verification.
        left_out: tensors that our selection leaves out, of ours and the seed's; they are as they were.
        left_out_by_seed: tensors that the seed has and did not publish.
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
        phases = ", ".join(f"{name} {_spent(self.seconds[name])}" for name in PHASES if name in self.seconds)
        again = f", {self.restarts} restarts" if self.restarts else ""
        checked = "verified" if self.verified else "NOT verified"
        unseen = [what for what in self.not_compared if what != "digests"]
        checked += f"; not compared: {', '.join(unseen)}" if unseen else ""
        if self.left_out or self.left_out_by_seed:
            checked += f"; left out: {len(self.left_out):,} here, {len(self.left_out_by_seed):,} by the seed"
        return (
            f"forked {self.tensors:,} tensors ({_size(self.nbytes)}) from {self.peer} over "
            f"{self.transport}/{self.fabric} in {_spent(self.total)} ({self.gbps:.2f} GB/s; {phases}); {checked}{again}"
        )

    __repr__ = __str__


class Stopwatch:
    """Adds up the time spent in named phases, one at a time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name: str | None = None
        self._since = 0.0

    def enter(self, name: str | None) -> None:
        """A phase begins, and the one before it ends."""
        now = time.perf_counter()
        if self._name is not None:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now

    def stop(self) -> Mapping[str, float]:
        """The last phase ends; the seconds of each."""
        self.enter(None)
        return self._seconds


def _spent(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"
