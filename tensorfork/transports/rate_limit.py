"""The rate limiter of all transports."""

import time


class RateLimiter:
    """Says when the next bytes may leave, so that no more than `rate` of them do in a second, on average.

    Not for several threads at once. Bytes may be anything that is counted, such as messages.

    Args:
        rate: bytes a second; None for no limit.
        catch_up: seconds lost by waking late that are made up for. Idle time beyond that is not.
    """

    def __init__(self, rate: float | None, *, catch_up: float = 0.0) -> None:
        self._rate, self._catch_up, self._next = rate, catch_up, 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next bytes may leave; 0 for at once."""
        return max(0.0, self._next - now) if self._rate else 0.0

    def spend(self, nbytes: int, now: float) -> None:
        """Count bytes that leave now."""
        if self._rate:
            self._next = max(self._next, now - self._catch_up) + nbytes / self._rate

    def try_spend(self, nbytes: int) -> float:
        """Count these bytes and return 0 if they may leave now; otherwise return the seconds that are to be waited."""
        now = time.monotonic()
        early = self.wait(now)
        if not early:
            self.spend(nbytes, now)
        return early

    def piece(self, nbytes: int, *, seconds: float = 0.1, least: int = 64 << 10) -> int:
        """The longest transfer to begin at once, where it is `nbytes` without a limit: what takes so many seconds."""
        return nbytes if not self._rate else min(nbytes, max(least, int(self._rate * seconds)))


def check_rate(rate: float | None) -> None:
    """Raise `ValueError` unless it is None, or more than 0 bytes a second."""
    if rate is not None and not rate > 0:
        raise ValueError(f"rate_limit is in bytes a second, more than 0; not {rate}")
