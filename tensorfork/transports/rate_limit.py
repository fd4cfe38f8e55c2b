"""The rate limiter that transports share."""

import time


class RateLimiter:
    """Says when the next bytes may be sent, so that on average no more than `rate` are sent in a second.

    Not thread-safe. Anything countable can take the place of bytes, such as messages.

    Args:
        rate: bytes a second; None for no limit.
        catch_up: seconds of lost time, such as from waking late, that may be made up for at a higher rate. Idle time
            beyond that is lost.
        start: when the first bytes may be sent, by `time.monotonic()`; at once, by default. Needed with an infinite
            `catch_up`, which then makes up for all time lost since.
    """

    def __init__(self, rate: float | None, *, catch_up: float = 0.0, start: float = 0.0) -> None:
        self._rate, self._catch_up, self._next = rate, catch_up, start

    def wait(self, now: float) -> float:
        """Seconds until the next bytes may be sent; 0 for at once."""
        return max(0.0, self._next - now) if self._rate else 0.0

    def spend(self, nbytes: int, now: float) -> None:
        """Count bytes that are sent now."""
        if self._rate:
            self._next = max(self._next, now - self._catch_up) + nbytes / self._rate

    def try_spend(self, nbytes: int) -> float:
        """If bytes may be sent now, count these and return 0; otherwise return the seconds to wait."""
        now = time.monotonic()
        seconds = self.wait(now)
        if not seconds:
            self.spend(nbytes, now)
        return seconds

    def piece(self, nbytes: int, *, seconds: float = 0.1, least: int = 64 << 10) -> int:
        """Bytes to send in one piece: what takes `seconds` at the rate, between `least` and `nbytes`."""
        return nbytes if not self._rate else min(nbytes, max(least, int(self._rate * seconds)))


def check_rate(rate: float | None) -> None:
    """Raise `ValueError` unless the rate is None, or more than 0 bytes a second."""
    if rate is not None and not rate > 0:
        raise ValueError(f"rate_limit is in bytes a second, more than 0; not {rate}")
