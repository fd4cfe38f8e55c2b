"""The rate limiter of all transports."""

import math

import pytest

from tensorfork.transports.rate_limit import RateLimiter


def test_a_rate_is_kept_on_average_and_idle_time_is_not_made_up_for() -> None:
    limiter = RateLimiter(1000.0)
    now, sent = 50.0, 0
    while now < 60.0:
        if wait := limiter.wait(now):
            now += wait
            continue
        limiter.spend(100, now)
        sent += 100
    assert sent == 10_000
    assert limiter.wait(now + 100) == 0
    limiter.spend(100, now + 100)
    assert limiter.wait(now + 100) == pytest.approx(0.1)


def test_without_a_rate_nothing_waits_and_with_one_pieces_are_short() -> None:
    unlimited = RateLimiter(None)
    unlimited.spend(1 << 40, 1.0)
    assert unlimited.wait(1.0) == 0
    assert unlimited.piece(1 << 30) == 1 << 30
    assert RateLimiter(10e6).piece(1 << 30) == 1_000_000
    assert RateLimiter(1.0).piece(1 << 30) == 64 << 10


def test_with_no_bound_to_catching_up_all_time_lost_since_the_start_is_made_up_for() -> None:
    limiter = RateLimiter(1000.0, catch_up=math.inf, start=50.0)
    assert limiter.wait(49.0) == pytest.approx(1.0)
    assert limiter.wait(50.0) == 0
    limiter.spend(1000, 50.0)
    assert limiter.wait(50.0) == pytest.approx(1.0)
    limiter.spend(1000, 55.0)  # four seconds late: the next may follow at once
    assert limiter.wait(55.0) == 0
    limiter.spend(4000, 55.0)
    assert limiter.wait(55.0) == pytest.approx(1.0)
