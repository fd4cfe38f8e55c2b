"""A seed's rate limit: one for all its leases, whatever their transports."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from group_seeds import model as parts
from group_seeds import published
from one_sided import OneSided
from seed_leases import SECONDS, connected, model, take, until

import tensorfork
from tensorfork import TransferFailed, Transport
from tensorfork.seed.rate_shares import RateShares
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.rate_limit import CATCH_UP
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages

RATE = 1200.0


class FakeLease:
    """What shares need to know of a lease."""

    def __init__(self, id: int, *, ended: bool = False) -> None:
        self.id = bytes([id])
        self.ended = threading.Event()
        self.may_read: float | None = None
        if ended:
            self.ended.set()


def shares(settle: float = 0.0) -> RateShares:
    def tell(lease: Any, share: float) -> None:
        lease.may_read = share

    return RateShares(RATE, tell, settle)


def enter(shares: RateShares, lease: Any, limited_by: str | None) -> None:
    lease.may_read = shares.enter(lease, limited_by)


def test_forks_that_read_by_themselves_have_equal_shares_and_are_told_of_each_change() -> None:
    made, leases = shares(), [FakeLease(i) for i in range(3)]
    for number, lease in enumerate(leases, 1):
        enter(made, lease, "fork")
        assert [one.may_read for one in leases[:number]] == [RATE / number] * number
    made.leave(leases[1])  # type: ignore[arg-type]
    made.leave(leases[1])  # type: ignore[arg-type]  # a second time changes nothing
    assert [leases[0].may_read, leases[2].may_read] == [RATE / 2, RATE / 2]


def test_leases_whose_bytes_the_seed_sends_have_what_the_others_leave_all_together() -> None:
    made, reader, sent, other = shares(), FakeLease(1), FakeLease(2), FakeLease(3)
    enter(made, sent, "seed")
    assert made.limiter.rate == RATE
    enter(made, reader, "fork")
    assert (made.limiter.rate, reader.may_read, sent.may_read) == (RATE / 2, RATE / 2, None)
    enter(made, other, "seed")
    assert (made.limiter.rate, reader.may_read) == (RATE * 2 / 3, RATE / 3)
    made.leave(reader)  # type: ignore[arg-type]
    assert made.limiter.rate == RATE


@pytest.mark.parametrize("limited_by", ["fork", "seed"])
def test_nobody_begins_before_those_who_read_have_had_time_to_hear_of_it(limited_by: str) -> None:
    made, reader, other = shares(settle=SECONDS), FakeLease(1), FakeLease(2)
    enter(made, reader, "fork")  # the first waits for nobody
    begins = threading.Thread(target=enter, args=(made, other, limited_by))
    begins.start()
    until(lambda: reader.may_read == RATE / 2, "the first is told")
    assert begins.is_alive()
    assert other.may_read is None
    assert made.limiter.rate == RATE / 2, "no lease whose bytes the seed sends has begun"
    other.ended.set()  # and a lease that ends meanwhile waits no longer
    begins.join(SECONDS)
    assert not begins.is_alive()


def test_who_does_not_read_by_himself_is_waited_for_by_nobody() -> None:
    made = shares(settle=SECONDS)
    for number in range(3):
        enter(made, FakeLease(number), "seed")


def test_without_a_limit_nobody_is_told_anything_and_bytes_are_counted() -> None:
    made, lease = RateShares(None, lambda lease, share: pytest.fail("told"), SECONDS), FakeLease(1)
    for _ in range(2):
        enter(made, lease, "fork")
        assert lease.may_read is None
    made.limiter.share().try_spend(100)
    assert (made.limiter.rate, made.limiter.spent) == (None, 100)
    made.leave(lease)  # type: ignore[arg-type]


# Seeds and forks.


def weights(nbytes: int) -> dict[str, torch.Tensor]:
    return {"weight": (torch.arange(nbytes) % 251).to(torch.uint8)}


def forked(address: str, transport: Transport | str, nbytes: int, **options: Any) -> tensorfork.ForkReport:
    ours = {"weight": torch.zeros(nbytes, dtype=torch.uint8)}
    report = tensorfork.fork_into(ours, address, transport=transport, **{"timeout": SECONDS, **options})
    assert torch.equal(ours["weight"], weights(nbytes)["weight"])
    return report


def together(*functions: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert not thread.is_alive()
    assert not errors, errors


def test_the_bytes_of_leases_over_two_transports_come_from_one_budget() -> None:
    nbytes, rate = 4_000_000, 16e6
    with tensorfork.publish(weights(nbytes), transports=["gloo", "zeromq"], rate_limit=rate) as seed:
        started = time.monotonic()
        together(*(partial(forked, seed.address, name, nbytes) for name in ("gloo", "zeromq")))
        seconds = time.monotonic() - started
        assert seed.stats().sent == 2 * nbytes
    assert 2 * nbytes <= rate * (seconds + CATCH_UP) + (512 << 10), "the sum is within the limit of one"


@pytest.mark.parametrize("transport", ["gloo", "zeromq"])
def test_without_a_limit_a_seed_counts_what_it_sends_and_the_report_has_none(transport: str) -> None:
    with tensorfork.publish(weights(100_000), transports=[transport]) as seed:
        assert seed.stats().sent == 0
        assert forked(seed.address, transport, 100_000).rate_limit is None
        assert seed.stats().sent == 100_000


@pytest.mark.parametrize(("transport", "timeout"), [(Gloo(), 4.0), (ZeroMQ(connections=3), 2.0), (OneSided(), 1.0)])
def test_a_limit_that_is_far_too_low_ends_at_the_forks_deadline_with_an_error_that_names_it(
    transport: Transport, timeout: float
) -> None:
    """The timeout must be enough for the pull to begin: gloo's groups take longest."""
    with tensorfork.publish(weights(3 << 20), transports=[transport], rate_limit=1234.5) as seed:
        with pytest.raises(TransferFailed, match=r"publish\(rate_limit=\), of 1,23[45] bytes a second .*2,5\d\d.\d s"):
            forked(seed.address, transport, 3 << 20, timeout=timeout)
        until(lambda: not seed.stats().running, "its lease ends")
        assert not seed._service._rates.limiter._waiting


def test_a_failure_that_has_nothing_to_do_with_the_limit_does_not_name_it() -> None:
    def broken(rate: float | None) -> None:
        raise TransferFailed("of another kind")

    with (
        tensorfork.publish(weights(1000), transports=[OneSided()], rate_limit=1e9) as seed,
        pytest.raises(TransferFailed, match="of another kind; 0 of"),
    ):
        forked(seed.address, OneSided(broken), 1000)


@pytest.mark.parametrize("stable", [False, True])
def test_a_fork_that_does_not_read_holds_up_nobody(stable: bool) -> None:
    """It has a lease, and asks for nothing."""
    with (
        tensorfork.publish(weights(1 << 20), transports=["zeromq"], rate_limit=1e9, stable=stable) as seed,
        connected(seed.address) as idle,
    ):
        take(idle)
        report = forked(seed.address, "zeromq", 1 << 20)
        assert report.rate_limit == 1e9
        assert seed.stats().running >= 1


def test_a_fork_that_reads_by_itself_hears_of_its_share_while_it_reads() -> None:
    nbytes, rate = 1 << 20, 64e6
    seen, of_second = list[float | None](), list[float | None]()
    begun, halved, alone = threading.Event(), threading.Event(), threading.Event()

    def first(share: float | None) -> None:
        """Copies on, slowly, until it has heard of the other's beginning, and then of its end."""
        if not seen or seen[-1] != share:
            seen.append(share)
        begun.set()
        if len(seen) == 2:
            halved.set()
            assert alone.wait(SECONDS)
        if len(seen) < 3:
            time.sleep(0.001)

    def second(share: float | None) -> None:
        assert halved.wait(SECONDS), "the first goes on reading, and hears"
        of_second.append(share)

    reading = OneSided(first)
    reading.piece = 64  # so many copies that the first outlasts the second
    with tensorfork.publish(weights(nbytes), transports=[OneSided()], rate_limit=rate) as seed:

        def fork_second() -> None:
            assert begun.wait(SECONDS)
            forked(seed.address, OneSided(second), nbytes)
            until(lambda: seed.stats().running == 1, "its lease ends")
            alone.set()

        together(lambda: forked(seed.address, reading, nbytes), fork_second)
        until(lambda: not seed._service._rates._leases, "nobody has a share any more")
    assert seen == [rate, rate / 2, rate]
    assert set(of_second) == {rate / 2}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transports", [["cuda_ipc"], ["nccl"], ["transfer_engine:nvlink"], ["cuda_ipc", "nccl"]])
def test_forks_between_gpus_keep_within_the_limit_all_together(transports: list[str]) -> None:
    sizes, rate = [200_000_000, 5_000, 50_000_000], 1e9
    right, ours = parts("cuda:1", sizes, 7), [parts("cuda:1", sizes) for _ in transports]

    def fork(into: dict[str, torch.Tensor], transport: str) -> None:
        report = tensorfork.fork_into(into, address, transport=transport, timeout=3 * SECONDS)
        assert report.rate_limit == rate
        assert all(torch.equal(into[name], right[name]) for name in right)

    with published(("", "cuda:0", sizes, 7), transports=transports, rate_limit=rate) as address:
        started = time.monotonic()
        together(*(partial(fork, into, transport) for into, transport in zip(ours, transports, strict=True)))
        seconds = time.monotonic() - started
    burst = len(transports) * (rate * CATCH_UP + (64 << 20))
    assert len(transports) * sum(sizes) <= rate * seconds + burst


def test_a_lease_for_digests_alone_has_no_part_in_the_limit() -> None:
    with tensorfork.publish(model(), transports=[OneSided()], rate_limit=1e9) as seed, connected(seed.address) as other:
        request = messages.TakeLease(messages.NO_TRANSPORT, {}, SECONDS, False)
        leased, _ = other.request(request, messages.Leased, time.monotonic() + SECONDS, "lease")
        assert (leased.rate_limit, leased.share) == (1e9, None)
        request = messages.TakeLease("one_sided", {}, SECONDS, False)
        leased, _ = other.request(request, messages.Leased, time.monotonic() + SECONDS, "lease")
        assert (leased.rate_limit, leased.share) == (1e9, 1e9)
