"""A seed's rate limit, divided among its leases.

Where the seed sends the bytes, its leases share one limiter. Forks that read by themselves are told how much each may
read: the rate, divided by all the leases that there are. They are told again when a lease begins or ends. The others'
limiter has what is left.

The limit is kept in sum also while shares change. Whoever is to read less is told so first, and a lease begins `SETTLE`
later: forks that read by themselves look for messages every 20 to 50 ms. So everybody's share in force is at most the
rate divided by the leases under way. A share that grows does so at once: what it grows by was given up before.
"""

import threading
from collections.abc import Callable

from attrs import define

from tensorfork.seed.leases import Lease
from tensorfork.transports.rate_limit import RateLimiter

SETTLE = 0.2
"""Seconds in which forks that read by themselves are taken to have heard of a smaller share, and to obey it."""


class RateShares:
    """The shares of one seed's leases. For any thread.

    Attributes:
        rate: bytes a second of all leases together; None for no limit.
        limiter: for the leases whose bytes the seed sends; it counts them also without a limit.

    Args:
        rate: see the attribute.
        tell: tells a lease's fork what it may read from now on, in bytes a second. It must not wait.
        settle: seconds that a lease waits where others are to read less.
    """

    def __init__(self, rate: float | None, tell: Callable[[Lease, float], None], settle: float = SETTLE) -> None:
        self.rate, self._tell, self._settle = rate, tell, settle
        self._lock = threading.Lock()
        self._leases: dict[bytes, _Member] = {}
        self.limiter = RateLimiter(None if rate is None else self._rate_of_seed)

    def enter(self, lease: Lease, limited_by: str | None) -> float | None:
        """A lease begins: the others are told of their new shares, and this waits until they obey, or it has ended.

        `limited_by` is its transport's `rate_limited_by`. Returns what its fork may read, in bytes a second; None where
        the seed holds the limit itself, or has none. Changes of that are told from now on.
        """
        if self.rate is None or limited_by is None:
            return None
        member = _Member(lease, limited_by == "fork")
        with self._lock:
            self._leases[lease.id] = member
            readers = self._tell_all()
        if readers:
            lease.ended.wait(self._settle)
        with self._lock:
            member.begun = True
            return self._share() if member.reads else None

    def leave(self, lease: Lease) -> None:
        """A lease has ended, and its fork reads nothing more: its share is the others'. Nothing if it never entered."""
        with self._lock:
            if self._leases.pop(lease.id, None) is not None:
                self._tell_all()

    def _share(self) -> float:
        assert self.rate is not None
        return self.rate / max(1, len(self._leases))

    def _tell_all(self) -> bool:
        """Tell the forks that read by themselves what they may. Whether there are any."""
        readers = [member.lease for member in self._leases.values() if member.reads and member.begun]
        for lease in readers:
            self._tell(lease, self._share())
        return bool(readers)

    def _rate_of_seed(self) -> float:
        """What the leases whose bytes the seed sends may have together; never 0."""
        with self._lock:
            sent = sum(not member.reads and member.begun for member in self._leases.values())
            return self._share() * max(1, sent)


@define(eq=False)
class _Member:
    """A lease; whether its fork reads by itself; and whether it is under way, and so told of changes."""

    lease: Lease
    reads: bool
    begun: bool = False
