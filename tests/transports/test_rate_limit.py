"""The rate limiter of all transports, driven by a clock that the tests turn."""

import math
import random
import threading
from typing import Any

import pytest
from attrs import define

from tensorfork import TransportUnavailable
from tensorfork.testing import FaultyTransport
from tensorfork.testing.faults import Fault
from tensorfork.transports import registry
from tensorfork.transports.cuda_ipc import CudaIpc
from tensorfork.transports.process_group import NCCL, Gloo
from tensorfork.transports.rate_limit import CATCH_UP, LEAST_PIECE, LONGEST_WAIT, RateLimiter, Share, limited_piece
from tensorfork.transports.transfer_engine import TransferEngine

RATE = 1000.0


@define
class Clock:
    now: float = 50.0

    def __call__(self) -> float:
        return self.now


@define
class Sender:
    """A lease that sends pieces of one size, each as soon as it may. Its process takes part until it is stopped."""

    share: Share
    nbytes: int
    at: float = 0.0
    """When it asks next."""
    sent: int = 0

    def ask(self, clock: Clock, late: float = 0.0) -> None:
        seconds = self.share.try_spend(self.nbytes)
        self.sent += 0 if seconds else self.nbytes
        self.at = clock.now + seconds + (late if seconds else 0.0)


def run(clock: Clock, senders: list[Sender], until: float, late: float = 0.0) -> None:
    """Have them send until a moment, each waking `late` seconds after the time that it was told."""
    for sender in senders:
        sender.at = max(sender.at, clock.now)
    while (sender := min(senders, key=lambda one: one.at)).at < until:
        clock.now = max(clock.now, sender.at)
        sender.ask(clock, late)
    clock.now = until


def test_one_sends_as_many_bytes_as_the_rate_allows() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    sent = 0
    while clock.now < 60.0:
        if wait := limiter.try_spend(100):
            clock.now += wait
        else:
            sent += 100
    assert sent == limiter.spent
    assert sent == pytest.approx(10_000, abs=100)


def test_idle_time_is_not_made_up_for_however_long() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    for idle in (0.0, 100.0, CATCH_UP * 1.01):
        clock.now += idle
        assert limiter.try_spend(100) == 0
        assert limiter.try_spend(100) == pytest.approx(0.1)
        clock.now += 0.1
        assert limiter.try_spend(1) == 0  # what it was told to wait for
        clock.now += 0.001


@pytest.mark.parametrize(("lost", "made_up"), [(0.02, 0.02), (CATCH_UP, CATCH_UP), (3.0, CATCH_UP)])
def test_time_that_is_lost_while_somebody_wants_to_send_is_made_up_for_up_to_a_bound(
    lost: float, made_up: float
) -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    limiter.spend(100)
    clock.now += limiter.wait() + lost
    sent = 0
    while not limiter.wait():
        limiter.spend(1)
        sent += 1
    assert sent == pytest.approx(RATE * made_up, abs=2)


def test_time_lost_between_the_leave_to_send_and_the_sending_is_made_up_for_too() -> None:
    """As in a pull that waits for a handle: it asked at once, and has nothing to read yet."""
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    assert limiter.wait() == 0
    clock.now += 1.0
    limiter.spend(10)
    assert limiter.wait() == 0
    limiter.spend(round(RATE * CATCH_UP) - 10)
    assert limiter.wait() == pytest.approx(0.0, abs=1e-6)
    limiter.spend(100)
    assert limiter.wait() == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(20))
def test_in_no_span_of_time_more_is_let_through_than_the_rate_the_catch_up_and_a_piece(seed: int) -> None:
    clock, draw = Clock(), random.Random(seed)
    limiter = RateLimiter(RATE, clock=clock)
    shares, passed = [limiter.share() for _ in range(3)], list[tuple[float, int]]()
    pieces = [draw.randrange(1, 100) for _ in shares]
    for _ in range(3000):
        i = draw.randrange(3)
        if draw.random() < 0.02:
            shares[i].close()
        if not shares[i].try_spend(pieces[i]):
            passed.append((clock.now, pieces[i]))
        clock.now += draw.choice([0.0, 0.0, 0.001, 0.01, 0.1, 2.0 if draw.random() < 0.01 else 0.0])
    slack = RATE * CATCH_UP + 3 * max(pieces)  # each may have been granted one that it asks for later
    for first in range(0, len(passed), 7):
        sent = 0
        for at, nbytes in passed[first:]:
            sent += nbytes
            assert sent <= RATE * (at - passed[first][0]) + slack


def test_two_leases_have_half_each_by_bytes_however_long_their_pieces_are() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    small, large = Sender(limiter.share(), 10), Sender(limiter.share(), 170)
    run(clock, [small, large], 150.0)
    assert small.sent + large.sent == pytest.approx(100_000, abs=400)
    assert small.sent == pytest.approx(large.sent, abs=400)
    assert (small.share.spent, large.share.spent) == pytest.approx((small.sent, large.sent), abs=170)


def test_none_starves_among_many_and_waking_late_costs_no_bytes() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    senders = [Sender(limiter.share(), nbytes) for nbytes in (20, 30, 64, 100, 170, 20, 30, 64)]
    run(clock, senders, 130.0, late=0.004)
    assert sum(one.sent for one in senders) == pytest.approx(80_000, abs=600)
    assert [one.sent for one in senders] == pytest.approx([10_000] * 8, abs=350)


def test_a_lease_that_does_not_ask_costs_the_others_nothing_and_has_no_claim_when_it_comes_back() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    steady, slow = Sender(limiter.share(), 10), Sender(limiter.share(), 10)
    run(clock, [steady, slow], 60.0)
    before = steady.sent, slow.sent
    run(clock, [steady], 70.0)  # the other one's fork has stopped reading, in the middle of its wait
    assert steady.sent - before[0] == pytest.approx(10_000, abs=50)
    before = steady.sent, slow.sent
    run(clock, [steady, slow], 80.0)
    assert steady.sent - before[0] == pytest.approx(5_000, abs=50)
    assert slow.sent - before[1] == pytest.approx(5_000, abs=50)


def test_each_is_told_to_wait_until_its_turn() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    shares = [limiter.share() for _ in range(3)]
    for share in shares:
        assert share.try_spend(100) == pytest.approx(0.0 if share is shares[0] else 0.1)
    assert shares[0].try_spend(10) == LONGEST_WAIT  # behind the two that have had nothing
    clock.now += 0.301
    assert [share.try_spend(100) == 0 for share in shares] == [False, True, False]


def test_time_lost_while_one_of_several_waits_is_made_up_for() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    one, other = limiter.share(), limiter.share()
    assert one.try_spend(100) == 0
    assert other.try_spend(100) == pytest.approx(0.1)
    assert one.try_spend(200) == LONGEST_WAIT
    clock.now += 0.101
    assert other.try_spend(100) == 0
    clock.now += 3.0
    assert one.try_spend(200) == 0
    assert limiter.wait() == pytest.approx(0.2 - CATCH_UP)


def test_what_a_lease_waits_for_is_free_when_it_closes() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    one, other = limiter.share(), limiter.share()
    assert one.try_spend(100) == 0
    assert one.try_spend(10_000) == pytest.approx(0.1)
    clock.now += 0.05
    waits = other.try_spend(10)
    one.close()
    assert other.try_spend(10) == pytest.approx(0.05)
    assert waits == pytest.approx(0.05)
    clock.now += 0.0501
    assert other.try_spend(10) == 0
    assert limiter.spent == 110


def test_what_was_granted_and_not_fetched_is_given_back_when_the_lease_closes() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    one, other = limiter.share(), limiter.share()
    assert one.try_spend(100) == 0
    assert one.try_spend(5_000) == pytest.approx(0.1)
    clock.now += 0.101
    assert other.try_spend(200) == 0  # it has had less
    clock.now += 0.201
    assert other.try_spend(10) == LONGEST_WAIT  # which grants the first its 5,000 bytes
    assert limiter.spent == 5_300
    one.close()
    assert limiter.spent == 300
    assert other.try_spend(10) == 0


def test_a_lease_has_its_own_limit_besides_and_waits_for_it_without_a_claim_on_the_others() -> None:
    clock = Clock()
    limiter = RateLimiter(RATE, clock=clock)
    limited, free = Sender(limiter.share(100.0), 10), Sender(limiter.share(), 10)
    assert limited.share.rate == 100.0
    assert free.share.rate == RATE
    run(clock, [limited, free], 60.0)
    assert limited.sent == pytest.approx(1_000, abs=30)
    assert free.sent == pytest.approx(9_000, abs=50)


def test_without_a_rate_nothing_waits_and_bytes_are_counted() -> None:
    limiter = RateLimiter()
    limiter.spend(1 << 40)
    share = limiter.share()
    assert [share.try_spend(1 << 40) for _ in range(3)] == [0, 0, 0]
    assert limiter.wait() == 0
    assert limiter.spent == 4 << 40
    assert share.spent == 3 << 40


def test_a_rate_that_changes_counts_from_then_on_also_for_what_is_waited_for() -> None:
    clock, rate = Clock(), [RATE]
    limiter = RateLimiter(lambda: rate[0], clock=clock)
    limiter.spend(10)
    rate[0] = 100.0
    assert limiter.wait() == pytest.approx(0.1)
    clock.now += 0.05
    rate[0] = 500.0
    assert limiter.wait() == pytest.approx(0.01)
    assert limiter.rate == 500.0


@pytest.mark.parametrize("rate", [1.0, 1e-300, 5e-324])
def test_however_low_the_rate_whoever_waits_asks_again_soon(rate: float) -> None:
    limiter = RateLimiter(rate, clock=Clock())
    share = limiter.share()
    assert share.try_spend(1 << 30) == 0
    waits = [limiter.wait(), limiter.try_spend(1), share.try_spend(1), limiter.share().try_spend(1)]
    assert waits == [LONGEST_WAIT] * 4
    limiter = RateLimiter(rate, clock=Clock())
    first, granted, other = limiter.share(), limiter.share(), limiter.share()
    limiter._waiting.append(granted)  # as if it had been granted while another asked
    granted.wanted = 1 << 30
    assert first.try_spend(1 << 30) == LONGEST_WAIT
    granted.close()
    first.close()
    assert other.try_spend(1) == 0


def test_a_piece_takes_no_longer_than_some_milliseconds_at_the_rate_but_is_not_divided_for_ever() -> None:
    assert limited_piece(1 << 30, None) == 1 << 30
    assert limited_piece(1 << 30, 1e9) == 5_000_000
    assert limited_piece(1 << 20, 1e9) == 1 << 20
    assert limited_piece(1 << 30, 1.0) == LEAST_PIECE
    assert RateLimiter(1e9).piece(1 << 30) == 5_000_000
    assert CudaIpc().limited_piece(100e9) == CudaIpc(rate_limit=100e9).piece == 32 << 20
    assert CudaIpc().limited_piece(1e9) == 5_000_000
    assert TransferEngine().limited_piece(1e9) == TransferEngine(rate_limit=1e9).piece == 5_000_000
    assert Gloo(rate_limit=1e8).piece == 500_000


def test_many_threads_at_once_spend_what_is_counted() -> None:
    limiter, granted = RateLimiter(1e15), list[int]()

    def spend() -> None:
        share, count = limiter.share(), 0
        while count < 500:
            count += share.try_spend(7) == 0
        granted.append(count)

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limiter.spent == 7 * sum(granted) == 14_000


BAD = [(0, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (10**400, ValueError)]


@pytest.mark.parametrize("transport", [CudaIpc, TransferEngine, Gloo, NCCL])
@pytest.mark.parametrize(("wrong", "error"), [*BAD, (True, TypeError), ("1e9", TypeError)])
def test_a_rate_that_cannot_be_is_refused_by_each_transport(
    transport: type[Any], wrong: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"rate_limit .*bytes a second"):
        transport(rate_limit=wrong)


def test_a_seed_with_a_limit_offers_only_what_can_hold_it() -> None:
    class Unlimited(CudaIpc):
        name = "unlimited"
        rate_limited_by = None

    assert set(registry.offered(None, limited=True)) == set(registry.BUILT_IN)
    assert set(registry.offered([Unlimited()])) == {"unlimited"}
    with pytest.raises(TransportUnavailable, match="'unlimited' cannot hold a seed's rate_limit="):
        registry.offered([Unlimited()], limited=True)
    assert registry.offered([FaultyTransport(Gloo(), Fault())], limited=True)
