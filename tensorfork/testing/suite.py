"""The suite that every transport must pass: tests of the contract in `tensorfork.transports.base`.

Each test creates a seed's memory and a fork's, with known contents and guard bytes round every region, takes a lease as
`publish` and `fork_into` would, and pulls. Whatever a test is about, every pull is also checked for these: `done` is
called once for each copy, on the caller's thread, when the bytes are there; afterwards every byte of the fork's memory
is what it should be, those between and round the destinations too; the seed's memory has not changed; and at the end of
the lease `serve` returns without an error.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import msgpack
import pytest

from tensorfork import Copy, PeerUnreachable, ProtocolError, TransferFailed, Transport, TransportUnavailable
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.fixtures import SuiteFixtures, spawned_only
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.testing.harness import SAME_PROCESS, SPAWNED_PROCESS, Harness
from tensorfork.testing.helper_process import HelperProcess
from tensorfork.testing.lease_under_test import TIME_TOLERANCE, CallOnce, CopySpec, LeaseUnderTest, run_in_threads
from tensorfork.testing.local_seed import SITE, LocalSeed
from tensorfork.testing.seed_memory import SeedMemorySuite


class TransportSuite(SeedMemorySuite, SuiteFixtures):
    """Inherit it at the top level of a test module, as a class whose name pytest collects, and define `make`.

    Attributes:
        devices: pairs of the seed's device and the fork's, as torch names them; every test runs for each pair.
        ways: ``"within one process"``, ``"from a spawned process"`` (the seed is there), or (the default) both.
        one_sided: the seed's process takes no part in a pull, so that a pull may succeed while the seed does not serve,
            or is stopped. A transport that is not answers requests only for what was published, and survives memory of
            the seed's that is unmapped.
        can_stop: a process of the transport may be stopped (SIGSTOP) without harm to what other tests use.
        big: bytes of a big copy, and of a transfer that is interrupted; more than the buffers between the two sides
            hold.
        seconds: a deadline that any pull of the suite meets on a slow and busy machine.
        short: the deadline of a pull that cannot succeed.
        under_way: the deadline of a pull that is interrupted; its first copies must have arrived by then.
    """

    devices: ClassVar[Sequence[tuple[str, str]]] = [("cpu", "cpu")]
    ways: ClassVar[Sequence[str]] = (SAME_PROCESS, SPAWNED_PROCESS)
    one_sided: ClassVar[bool] = False
    can_stop: ClassVar[bool] = True
    big: ClassVar[int] = 48 << 20
    seconds: ClassVar[float] = 30.0
    short: ClassVar[float] = 0.5
    under_way: ClassVar[float] = 3.0

    def make(self) -> Transport:
        """A new transport. Called in this process and in the spawned one, which imports the class by its name."""
        raise NotImplementedError(f"{type(self).__name__} must say how its transport is made")

    # Bytes arrive.

    def test_a_region_arrives(self, harness: Harness) -> None:
        with harness.lease([100_000], [100_000]) as lease:
            lease.pull([CopySpec(0, 0, 0, 0, 100_000)])

    @pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 63, 64, 4095, 4096, 4097, 65_537, (1 << 20) - 1, (1 << 20) + 1])
    def test_odd_sizes_at_odd_offsets_arrive_and_their_neighbours_stay(self, harness: Harness, nbytes: int) -> None:
        with harness.lease([nbytes + 40], [nbytes + 90]) as lease:
            lease.pull([CopySpec(0, 17, 0, 31, nbytes)])

    def test_a_big_copy_arrives(self, harness: Harness) -> None:
        with harness.lease([self.big + 13], [self.big + 99]) as lease:
            lease.pull([CopySpec(0, 5, 0, 3, self.big + 7)])

    def test_a_pull_of_no_copies_returns(self, harness: Harness) -> None:
        with harness.lease([1000], [1000]) as lease:
            lease.pull([])

    def test_many_small_copies_arrive_in_random_order(self, harness: Harness) -> None:
        draw = random.Random(1)
        specs, at = [], 0
        for _ in range(3000):
            nbytes = draw.randint(1, 200)
            specs.append(CopySpec(0, draw.randrange(500_000 - nbytes), 0, at, nbytes))
            at += nbytes + draw.randint(0, 3)
        draw.shuffle(specs)
        with harness.lease([500_000], [at]) as lease:
            lease.pull(specs)

    def test_many_regions_in_random_order_arrive(self, harness: Harness) -> None:
        draw = random.Random(2)
        sizes = [draw.randint(1, 20_000) for _ in range(300)]
        order = draw.sample(range(300), 300)
        with harness.lease(sizes, [sizes[i] + 9 for i in order]) as lease:
            specs = [CopySpec(source, 0, into, 9, sizes[source]) for into, source in enumerate(order)]
            lease.pull(draw.sample(specs, 300))

    def test_pieces_of_all_sizes_from_and_into_several_regions_arrive(self, harness: Harness) -> None:
        draw = random.Random(3)
        sizes = [3_000_001, 70_000, 1_000_003]
        specs = []
        for into, nbytes in enumerate(sizes):
            at = 0
            while at < nbytes:
                length = min(nbytes - at, int(2 ** draw.uniform(0, 21)))
                source = draw.choice([i for i in range(3) if sizes[i] >= length])
                specs.append(CopySpec(source, draw.randint(0, sizes[source] - length), into, at, length))
                at += length + draw.randint(0, 50)
        with harness.lease(sizes, sizes) as lease:
            lease.pull(draw.sample(specs, len(specs)))

    # More than one pull, session and lease.

    def test_a_session_pulls_again_and_brings_what_the_seed_holds_by_then(self, harness: Harness) -> None:
        with harness.lease([50_000], [50_000]) as lease:
            lease.pull([CopySpec(0, 0, 0, 0, 50_000)])
            lease.refill_seed()
            lease.pull([CopySpec(0, 10, 0, 20, 30_000)])
            lease.pull([])
            lease.pull([CopySpec(0, 0, 0, 0, 50_000)])

    def test_two_leases_are_read_at_once(self, harness: Harness) -> None:
        nbytes = self.big // 4
        with harness.lease([nbytes], [nbytes]) as one, harness.lease([nbytes], [nbytes + 5]) as other:
            barrier = threading.Barrier(2)

            def read(lease: LeaseUnderTest, at: int) -> None:
                barrier.wait(self.seconds)
                lease.pull([CopySpec(0, i, 0, at + i, nbytes // 16) for i in range(0, nbytes, nbytes // 16)])

            run_in_threads(lambda: read(one, 0), lambda: read(other, 5))

    def test_two_leases_of_one_seed_are_read_in_turn(self, harness: Harness) -> None:
        with harness.lease([9000], [9000]) as one, harness.lease([4000], [4000], same_seed=one) as other:
            one.pull([CopySpec(0, 0, 0, 0, 4000)])
            other.pull([CopySpec(0, 3000, 0, 0, 4000)])
            one.pull([CopySpec(0, 4000, 0, 4000, 5000)])

    def test_a_new_lease_is_good_after_another_has_ended(self, harness: Harness) -> None:
        with harness.lease([9000], [9000]) as one:
            one.pull([CopySpec(0, 0, 0, 0, 9000)])
        with harness.lease([9000], [9000], same_seed=one) as other:
            other.pull([CopySpec(0, 0, 0, 0, 9000)])

    # Facts and cover.

    def test_facts_travel_and_say_that_the_two_sides_fit(self, harness: Harness) -> None:
        transport = self.make()
        regions = GuardedMemory(harness.setup.fork_device, [100, 200], 1).regions
        facts = dict(transport.facts(regions))
        assert msgpack.unpackb(msgpack.packb(facts), strict_map_key=True) == facts
        assert dict(transport.facts(regions)) == facts
        seed_facts = harness.seed([100, 200]).facts()
        assert transport.why_not(facts, seed_facts) is None
        assert transport.why_not(facts, seed_facts) is None

    def test_each_region_lies_within_the_one_that_covers_it(self, harness: Harness) -> None:
        memory = GuardedMemory(harness.setup.fork_device, [100, 200_000, 3], 1)
        covers, places = self.make().cover(memory.regions)
        by_id = {region.id: region for region in covers}
        assert len(by_id) == len(covers)
        assert len(places) == 3
        for region, place in zip(memory.regions, places, strict=True):
            cover = by_id[place.region]
            assert cover.address + place.offset == region.address
            assert place.offset + region.nbytes <= cover.nbytes
            assert cover.device == region.device

    # Cancellation, deadlines, errors and the end of a lease.

    def test_nothing_is_pulled_once_cancelled(self, harness: Harness) -> None:
        cancel = threading.Event()
        cancel.set()
        with harness.lease([self.big], [self.big]) as lease:
            lease.fail(lease.stripes(16), cancel=cancel)

    def test_a_pull_ends_soon_when_it_is_cancelled_from_done(self, harness: Harness) -> None:
        cancel = threading.Event()
        with harness.lease([self.big], [self.big]) as lease:
            started = time.monotonic()
            lease.fail(
                lease.stripes(64), cancel=cancel, then=lambda _: cancel.set(), seconds=TIME_TOLERANCE * self.seconds
            )
            assert time.monotonic() - started < self.seconds

    def test_a_pull_ends_soon_when_it_is_cancelled_while_nothing_comes(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        cancel = threading.Event()
        try:
            with harness.lease([1000], [1000], serve=False, seconds=self.short) as lease:
                threading.Timer(0.1, cancel.set).start()
                started = time.monotonic()
                lease.fail([CopySpec(0, 0, 0, 0, 1000)], cancel=cancel)
                assert time.monotonic() - started < self.seconds / 2
        except (TransportUnavailable, PeerUnreachable):
            pass  # this transport needs a serving seed to open a session

    def test_nothing_is_pulled_past_the_deadline(self, harness: Harness) -> None:
        with harness.lease([self.big], [self.big]) as lease:
            lease.fail(lease.stripes(16), seconds=-1.0)

    def test_a_seed_that_does_not_serve_costs_no_more_than_the_deadline(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        started = time.monotonic()
        try:
            with harness.lease([1000], [1000], serve=False, seconds=self.short) as lease:
                lease.fail([CopySpec(0, 0, 0, 0, 1000)], seconds=self.short)
        except (TransportUnavailable, PeerUnreachable):
            pass  # this transport needs a serving seed to open a session
        assert time.monotonic() - started < TIME_TOLERANCE * (2 * self.short + 1)

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_what_done_raises_ends_the_pull_and_reaches_the_caller(
        self, harness: Harness, kind: type[BaseException]
    ) -> None:
        error = kind("of the caller's")

        def done(_: int) -> None:
            raise error

        with harness.lease([self.big], [self.big]) as lease, pytest.raises(kind) as caught:
            lease.try_pull(lease.stripes(16), then=done)
        assert caught.value is error

    def test_closing_twice_and_after_a_failure_is_harmless(self, harness: Harness) -> None:
        with harness.lease([1000], [1000]) as lease:
            lease.fail([CopySpec(0, 0, 0, 0, 1000)], seconds=-1.0)
            lease.session.close(time.monotonic() + self.seconds)
            lease.session.close(time.monotonic() + self.seconds)
        with harness.lease([1000], [1000]) as lease:
            lease.pull([CopySpec(0, 0, 0, 0, 1000)])
            lease.session.close(time.monotonic() + self.seconds)
            lease.session.close(time.monotonic() + self.seconds)

    def test_an_offer_that_makes_no_sense_is_refused(self, harness: Harness) -> None:
        transport = self.make()
        regions, _ = transport.cover(GuardedMemory(harness.setup.fork_device, [5000], 1).regions)
        nobody = QueueChannel(lambda _: None)
        for offer in (b"", b"\0", b"nonsense", bytes(1000), b"\xff" * 64, b"{}", b"[]", b"\x80", b"\x90", b"\xc0"):
            with pytest.raises((ProtocolError, TransportUnavailable, PeerUnreachable)):
                transport.open(offer, SITE.host, [], regions, nobody, time.monotonic() + self.short)

    def test_a_lease_that_no_fork_opens_ends(self, harness: Harness) -> None:
        transport = self.make()
        seed = harness.seed([5000])
        facts = transport.facts(GuardedMemory(harness.setup.fork_device, [5000], 1).regions)
        granted = seed.grant_lease(dict(facts), self.seconds, True, QueueChannel(lambda _: None))
        harness.check_ending(seed.end_lease(granted.number, self.seconds))

    def test_a_lease_that_ends_before_it_is_served_ends(self, harness: Harness) -> None:
        transport = self.make()
        seed = harness.seed([5000])
        facts = transport.facts(GuardedMemory(harness.setup.fork_device, [5000], 1).regions)
        granted = seed.grant_lease(dict(facts), self.seconds, False, QueueChannel(lambda _: None))
        harness.check_ending(seed.end_lease(granted.number, self.seconds))

    def test_a_pull_fails_by_the_deadline_when_the_lease_has_ended(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the memory may be reached for as long as the fork has it open")
        with harness.lease([self.big], [self.big]) as lease:
            lease.pull([CopySpec(0, 0, 0, 0, 1000)])
            lease.end_at_seed()
            started = time.monotonic()
            lease.fail(lease.stripes(16), seconds=self.short)
            assert time.monotonic() - started < TIME_TOLERANCE * (self.short + 1)

    def test_a_pull_fails_by_the_deadline_when_the_lease_ends_under_way(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the memory may be reached for as long as the fork has it open")
        with harness.lease([self.big], [self.big]) as lease:
            once = CallOnce(lease.end_at_seed)
            lease.fail(lease.stripes(64), then=once, seconds=self.under_way)
            assert once.called

    # Nothing outside the regions is read or written.

    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [(0, 1), (-1, 2), (-1000, 100_000), ((1 << 62), 8), ((1 << 64) - 8, 16)],
        ids=["behind", "across the edge", "far across the edge", "far away", "round the end of all numbers"],
    )
    def test_a_copy_beyond_a_seeds_region_is_refused(self, harness: Harness, offset: int, nbytes: int) -> None:
        with harness.lease([3000, 200_000], [200_000]) as lease:
            place, end = lease.seed_places[0], lease.seed_region_size(0)
            start = end + offset if offset < 1 << 61 else offset
            bad = Copy(0, place.region, start, lease.fork_places[0].region, lease.fork_places[0].offset, nbytes)
            lease.fail_raw([bad])
        with harness.lease([3000], [3000], same_seed=lease) as again:
            again.pull([CopySpec(0, 0, 0, 0, 3000)])

    def test_a_region_the_seed_does_not_have_is_refused(self, harness: Harness) -> None:
        with harness.lease([3000], [3000]) as lease:
            unknown = 1 + max(remote.id for remote in lease.granted.remote)
            lease.fail_raw([Copy(0, unknown, 0, lease.fork_places[0].region, lease.fork_places[0].offset, 100)])
        with harness.lease([3000], [3000], same_seed=lease) as again:
            again.pull([CopySpec(0, 0, 0, 0, 3000)])

    @pytest.mark.parametrize("at", [2000, 1999, 1 << 40], ids=["behind", "across the edge", "far away"])
    def test_a_copy_beyond_our_own_region_is_refused(self, harness: Harness, at: int) -> None:
        with harness.lease([3000], [2000, 500]) as lease:
            into = lease.fork_places[0]
            edge = lease.fork_region_size(0) - 2000 - into.offset  # 0, unless the transport covers more
            theirs = lease.seed_places[0]
            lease.fail_raw([Copy(0, theirs.region, theirs.offset, into.region, into.offset + edge + at, 100)])

    def test_a_region_of_ours_that_was_not_given_is_refused(self, harness: Harness) -> None:
        with harness.lease([3000], [2000]) as lease:
            lease.fail_raw([Copy(0, lease.seed_places[0].region, lease.seed_places[0].offset, 999_999, 0, 100)])

    def test_good_copies_beside_a_refused_one_are_whole_when_they_are_done(self, harness: Harness) -> None:
        with harness.lease([100_000], [100_000]) as lease:
            good = [lease.copy(spec) for spec in lease.stripes(10)]
            bad = Copy(0, lease.seed_places[0].region, lease.seed_region_size(0), good[0].into, good[0].at, 1)
            lease.fail_raw([*good[:5], bad, *good[5:]], specs=[*lease.stripes(10)[:5], None, *lease.stripes(10)[5:]])

    # The seed's process is killed, or stopped.

    @spawned_only
    def test_a_seed_killed_under_way_fails_the_pull_by_the_deadline(self, harness: Harness) -> None:
        with harness.own_process() as helper_process, harness.lease([self.big], [self.big], seed_dies=True) as lease:
            self._interrupt(lease, helper_process.kill)
            if not self.one_sided:
                started = time.monotonic()
                lease.fail([CopySpec(0, 0, 0, 0, 1000)], seconds=self.short)
                assert time.monotonic() - started < TIME_TOLERANCE * (self.short + 1)

    @spawned_only
    def test_a_seed_stopped_under_way_fails_the_pull_by_the_deadline_and_nothing_comes_late(
        self, harness: Harness
    ) -> None:
        if not self.can_stop:
            pytest.skip("a stopped seed is not something this transport's library survives")
        with harness.own_process() as helper_process, harness.lease([self.big], [self.big]) as lease:
            undrained = self._interrupt(lease, helper_process.stop)
            lease.poison()
            helper_process.resume()
            with harness.lease([self.big], [self.big], same_seed=lease) as again:  # late bytes have time to come
                again.pull(again.stripes(16))
            assert lease.memory.first_difference(ignore=undrained) is None

    # The fork's process is killed, or stopped.

    @spawned_only
    def test_a_fork_killed_under_way_costs_its_seed_a_lease_and_nothing_else(
        self, harness: Harness, helper_process: HelperProcess
    ) -> None:
        self._check_loss_of_a_fork(harness, helper_process, HelperProcess.kill)

    @spawned_only
    def test_a_fork_stopped_under_way_costs_its_seed_a_lease_and_nothing_else(
        self, harness: Harness, helper_process: HelperProcess
    ) -> None:
        if not self.can_stop:
            pytest.skip("a stopped fork is not something this transport's library survives")
        self._check_loss_of_a_fork(harness, helper_process, HelperProcess.stop)

    def _check_loss_of_a_fork(
        self, harness: Harness, other: HelperProcess, lose: Callable[[HelperProcess], None]
    ) -> None:
        """A seed's lease ends although its fork is lost in mid-pull, and another process can fork from it then."""
        seed = LocalSeed(self.make(), harness.setup.seed_device, [self.big], 5)
        fork = HelperProcess(type(self))
        try:
            lost = fork.start_fork(seed, harness.setup.fork_device, self.big, self.seconds, hang=True)
            assert fork.next_answer() == "under way"
            lose(fork)
            started = time.monotonic()
            harness.check_ending(seed.end_lease(lost, self.seconds))
            assert time.monotonic() - started < self.seconds
            good = other.start_fork(seed, harness.setup.fork_device, self.big, self.seconds, hang=False)
            assert other.next_answer() is None
            harness.check_ending(seed.end_lease(good, self.seconds))
            assert seed.first_difference() is None
        finally:
            fork.close()

    def _interrupt(self, lease: LeaseUnderTest, interrupt: Callable[[], None]) -> Sequence[tuple[int, int]]:
        """Pull, and call `interrupt` when the first copy is done. Returns the memory that may still be written."""
        once = CallOnce(interrupt)
        undrained: Sequence[tuple[int, int]] = ()
        try:
            lease.try_pull(lease.stripes(64), then=once, seconds=self.under_way)
        except TransferFailed as error:
            undrained = error.undrained
            lease.undrained += undrained
        else:
            assert self.one_sided, "the pull succeeded without its seed"
        assert once.called
        return undrained
