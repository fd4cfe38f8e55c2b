"""Rate limits, in bytes a second: a seed's, which all its leases share, and one fork's. There is one kind of limiter.

Whoever is about to send or to read bytes asks first. The answer is 0, and the bytes are counted, or it is the seconds
after which to ask again. Nobody waits in here, so that those who ask go on noticing when their lease ends.

**Lost time.** Time that is lost while bytes were to be sent, such as by waking late, is made up for at a higher rate:
up to `CATCH_UP` seconds of it. Idle time is not. So in any `t` seconds at most ``rate * (t + CATCH_UP)`` bytes, and one
piece for each who shares it, are let through.

**Fairness.** Those who wait take turns by bytes (start-time fair queuing: Goyal, Vin, Cheng, 1996): of two leases that
always have something to send each sends half, however long the pieces of either are. A lease that has nothing to send,
or whose fork does not read, waits for nothing, and its part goes to the others.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from attrs import define

from tensorfork.validators import bytes_a_second

CATCH_UP = 0.05
"""Seconds of lost time that are made up for: more than two full collections of garbage take (20 ms each), or CUDA for
its first handle (10 ms), and so the longest stalls known in a pull; and so little that the burst behind one is over
before a seed has taken many steps."""
PIECE_SECONDS = 0.005
"""Seconds that one piece may take at the rate; a burst of a single one is no longer."""
LONGEST_WAIT = 0.2
"""Seconds after which whoever waits asks again, at most: the rate may have changed, or others may have left."""
LEAST_PIECE = 256 << 10
"""Bytes of a piece that are not divided further, however low the rate."""

Rate: TypeAlias = float | None
Clock: TypeAlias = Callable[[], float]


class RateLimiter:
    """Lets bytes through so that on average no more than `rate` are sent in a second. For any thread.

    One who is alone with it calls `try_spend`, or `wait` and then `spend`. Several that are to share it fairly have a
    `share` each. Anything countable can take the place of bytes, such as messages.

    Attributes:
        spent: the bytes that were let through, also where there is no limit.

    Args:
        rate: bytes a second, more than 0; None for no limit; or a function that returns either, if it may change.
        clock: returns the time, in seconds.
    """

    def __init__(self, rate: Rate | Callable[[], Rate] = None, *, clock: Clock = time.monotonic) -> None:
        self._ask_rate: Callable[[], Rate] = rate if callable(rate) else lambda: rate
        self._clock, self._lock = clock, threading.Lock()
        self._rate = self._ask_rate()
        self._next = -math.inf  # when the next bytes may be sent
        self._since: float | None = None  # since when somebody has wanted to send, and nothing was sent
        self._waiting: list[Share] = []
        self._virtual = 0.0  # fair queuing's virtual time: where the last that was served began, in bytes
        self.spent = 0

    @property
    def rate(self) -> float | None:
        """Bytes a second now; None for no limit."""
        return self._ask_rate()

    def wait(self) -> float:
        """The seconds after which to ask again; 0 if bytes may be sent now. Counts nothing: `spend` does."""
        with self._lock:
            now = self._now()
            self._want(now)
            return min(self._seconds(now), LONGEST_WAIT)

    def spend(self, nbytes: int) -> None:
        """Count bytes that are sent now."""
        with self._lock:
            self._take(nbytes, self._now())

    def try_spend(self, nbytes: int) -> float:
        """If bytes may be sent now, count these and return 0; otherwise return the seconds after which to ask again."""
        with self._lock:
            now = self._now()
            if seconds := self._seconds(now):
                self._want(now)
            else:
                self._take(nbytes, now)
            return min(seconds, LONGEST_WAIT)

    def share(self, rate: float | None = None) -> "Share":
        """A part in this limiter, for one lease. With `rate` it is limited to so many bytes a second besides."""
        return Share(self, None if rate is None else RateLimiter(rate, clock=self._clock))

    def piece(self, nbytes: int) -> int:
        """Bytes to send in one piece, at most `nbytes`; see `limited_piece`."""
        return limited_piece(nbytes, self.rate)

    def _try_share(self, share: "Share", nbytes: int) -> float:
        """`try_spend` for a share, in its turn."""
        with self._lock:
            now = self._now()
            if self._rate is None:
                self.spent, share.spent = self.spent + nbytes, share.spent + nbytes
                return 0.0
            if share.claim():  # granted while another asked
                return 0.0
            if not share.wanted:
                share.wanted, share.start = nbytes, max(self._virtual, share.finish)
                self._waiting.append(share)
            self._serve(now)
            if share.claim():
                return 0.0
            self._want(now)
            before = sum(one.wanted for one in self._waiting if one.start < share.start)
            return min(self._seconds(now) + before / self._rate, LONGEST_WAIT)

    def _serve(self, now: float) -> None:
        """Let through what those who wait have asked for, as far as the rate allows: first who has had least."""
        while self._waiting and not self._seconds(now):
            share = min(self._waiting, key=lambda one: one.start)
            self._waiting.remove(share)
            self._virtual, share.finish = share.start, share.start + share.wanted
            self._take(share.wanted, now)
            share.spent += share.wanted
            share.granted, share.last, share.wanted = True, share.wanted, 0

    def _withdraw(self, share: "Share") -> None:
        """Forget what a share waits for; and give back what it was granted and has not been told of."""
        with self._lock:
            if share in self._waiting:
                self._waiting.remove(share)
            if share.granted:
                self.spent -= share.last
                share.spent -= share.last
                self._next -= self._cost(share.last)
            share.wanted, share.granted = 0, False

    def _now(self) -> float:
        """The time. What is owed of time was counted in another rate, if that has changed since."""
        now, rate = self._clock(), self._ask_rate()
        if rate != self._rate:
            if self._rate and rate and self._next > now:
                self._next = now + (self._next - now) * self._rate / rate
            self._rate = rate
        return now

    def _seconds(self, now: float) -> float:
        return 0.0 if self._rate is None else max(0.0, self._next - now)

    def _cost(self, nbytes: int) -> float:
        """The seconds that bytes take at the rate; of an absurd rate a century, with which it can still be reckoned."""
        return 0.0 if self._rate is None else min(nbytes / self._rate, 3e9)

    def _want(self, now: float) -> None:
        self._since = now if self._since is None else self._since

    def _take(self, nbytes: int, now: float) -> None:
        self.spent += nbytes
        if self._rate is not None:
            if now - self._next > CATCH_UP:  # idle, except for the time in which somebody has wanted to send
                self._next = max(now - CATCH_UP, now if self._since is None else self._since)
            self._next += self._cost(nbytes)
        self._since = now if self._waiting else None


@define(eq=False)
class Share:
    """One lease's part in a limiter. Asked by one thread at a time. Made by `RateLimiter.share`.

    Attributes:
        limiter: what it is a part in.
        own: a limit of this lease alone, or None.
        spent: the bytes that were let through.
        wanted: the bytes that it waits for; 0 if it does not wait.
        start, finish: in fair queuing's virtual time, where what it waits for begins, and where its last bytes end.
        granted: whether what it waited for, `last` bytes, was let through, and it has not asked since.
    """

    limiter: RateLimiter
    own: RateLimiter | None
    spent: int = 0
    wanted: int = 0
    start: float = 0.0
    finish: float = 0.0
    granted: bool = False
    last: int = 0

    @property
    def rate(self) -> float | None:
        """Bytes a second that it may send if nobody else does; None for no limit."""
        return smaller(self.limiter.rate, None if self.own is None else self.own.rate)

    def try_spend(self, nbytes: int) -> float:
        """If so many bytes may be sent now, count them and return 0; otherwise return the seconds after which to ask
        again, for as many. It may have to wait again then.
        """
        if not nbytes:
            return 0.0
        if self.own is not None and not self.wanted and not self.granted and (seconds := self.own.wait()):
            return seconds
        seconds = self.limiter._try_share(self, nbytes)
        if not seconds and self.own is not None:
            self.own.spend(nbytes)
        return seconds

    def claim(self) -> bool:
        """Whether what it waited for has been granted; it is not from now on. For the limiter."""
        granted, self.granted = self.granted, False
        return granted

    def close(self) -> None:
        """Wait for nothing any more: the lease has ended. It may be asked again, as if it were new."""
        self.limiter._withdraw(self)


def smaller(one: float | None, other: float | None) -> float | None:
    """The smaller of two limits, of which None is none."""
    return min((rate for rate in (one, other) if rate is not None), default=None)


def limited_piece(nbytes: int, rate: float | None) -> int:
    """What takes `PIECE_SECONDS` at a rate: at most `nbytes`, and not less than `LEAST_PIECE` if that is no more."""
    return nbytes if rate is None else int(min(nbytes, max(LEAST_PIECE, rate * PIECE_SECONDS)))


def rate_limit(value: Any) -> float | None:
    """The rate that a caller gives, in bytes a second; None for none.

    Raises `TypeError` for what is no number, `ValueError` unless it is finite and more than 0.
    """
    return None if value is None else bytes_a_second("rate_limit", value)
