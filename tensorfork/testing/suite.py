"""The suite that every transport must pass: the contract of `tensorfork.transports.base`, tried out.

Each test makes a seed's memory and a fork's, both of known bytes with known bytes round every region, takes a lease as
`publish` and `fork_into` would, and pulls. Whatever a test is about, every pull is also checked for these: `done` comes
once for each copy, on the caller's thread, when the bytes are there; afterwards every byte of the fork's memory is what
it should be, those between and round the destinations too; the seed's memory has not changed; and at the end of the
lease `serve` returns, without an error.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import msgpack
import pytest

from tensorfork import Copy, PeerUnreachable, ProtocolError, TransferFailed, Transport, TransportUnavailable
from tensorfork.testing.ends import SITE, LocalSeed, Speaker
from tensorfork.testing.helper import Helper
from tensorfork.testing.lab import HERE, MARGIN, SPAWNED, Lab, Lease, Move, Once, Setup, run_together
from tensorfork.testing.memory import Memory


def _spawned_only(test: Callable[..., None]) -> Callable[..., None]:
    test.spawned_only = True  # type: ignore[attr-defined]  # read when the tests are generated
    return test


class TransportSuite:
    """Inherit it at the top level of a test module, as a class whose name pytest collects, and say how it is `make`d.

    Attributes:
        devices: where the seed's memory is and where the fork's, as torch names them; every test runs for each pair.
        ways: whether the seed is in this process, in a spawned one, or (the default) both, one after the other.
        one_sided: the seed's process takes no part in a pull, which so may succeed while it does not serve, or is
            stopped.
        can_stop: the seed's process may be stopped (SIGSTOP) and killed without harm to what other tests use.
        big: bytes of a big copy, and of a transfer in the middle of which something happens; more than the buffers
            between the two sides hold.
        seconds: a deadline within which any pull here is made on a slow and busy machine.
        short: the deadline of a pull that cannot be made.
        under_way: the deadline of a pull that something happens to; by then its first copies must have come.
    """

    devices: ClassVar[Sequence[tuple[str, str]]] = [("cpu", "cpu")]
    ways: ClassVar[Sequence[str]] = (HERE, SPAWNED)
    one_sided: ClassVar[bool] = False
    can_stop: ClassVar[bool] = True
    big: ClassVar[int] = 48 << 20
    seconds: ClassVar[float] = 30.0
    short: ClassVar[float] = 0.5
    under_way: ClassVar[float] = 3.0

    def make(self) -> Transport:
        """A new transport. Called in this process and in the spawned one, where the class is imported anew."""
        raise NotImplementedError(f"{type(self).__name__} must say how its transport is made")

    # How pytest runs it.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for each pair of devices, within one process and from a spawned one."""
        if "lab" in metafunc.fixturenames:
            ways = [way for way in self.ways if way != HERE or not hasattr(metafunc.function, "spawned_only")]
            setups = [Setup(way, *pair) for pair in self.devices for way in ways]
            nothing = pytest.param(None, marks=pytest.mark.skip(reason="needs a spawned process"), id="nowhere")
            metafunc.parametrize("setup", setups or [nothing], ids=str)

    @pytest.fixture(scope="class")
    @classmethod
    def helper(cls) -> Iterator[Helper | None]:
        """The spawned process that the tests of this class share."""
        if SPAWNED not in cls.ways:
            yield None
            return
        helper = Helper(cls)
        yield helper
        helper.close()

    @pytest.fixture
    def lab(self, helper: Helper | None, setup: Setup) -> Iterator[Lab]:
        """What a test works with."""
        with Lab(self, setup, helper if setup.way == SPAWNED else None) as lab:
            yield lab

    # Bytes arrive.

    def test_a_region_arrives(self, lab: Lab) -> None:
        with lab.lease([100_000], [100_000]) as lease:
            lease.pull([Move(0, 0, 0, 0, 100_000)])

    @pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 63, 64, 4095, 4096, 4097, 65_537, (1 << 20) - 1, (1 << 20) + 1])
    def test_odd_sizes_at_odd_offsets_arrive_and_their_neighbours_stay(self, lab: Lab, nbytes: int) -> None:
        with lab.lease([nbytes + 40], [nbytes + 90]) as lease:
            lease.pull([Move(0, 17, 0, 31, nbytes)])

    def test_a_big_copy_arrives(self, lab: Lab) -> None:
        with lab.lease([self.big + 13], [self.big + 99]) as lease:
            lease.pull([Move(0, 5, 0, 3, self.big + 7)])

    def test_no_copies_are_made_at_once(self, lab: Lab) -> None:
        with lab.lease([1000], [1000]) as lease:
            lease.pull([])

    def test_many_small_copies_arrive_in_random_order(self, lab: Lab) -> None:
        draw = random.Random(1)
        moves, at = [], 0
        for _ in range(3000):
            nbytes = draw.randint(1, 200)
            moves.append(Move(0, draw.randrange(500_000 - nbytes), 0, at, nbytes))
            at += nbytes + draw.randint(0, 3)
        draw.shuffle(moves)
        with lab.lease([500_000], [at]) as lease:
            lease.pull(moves)

    def test_many_regions_in_random_order_arrive(self, lab: Lab) -> None:
        draw = random.Random(2)
        sizes = [draw.randint(1, 20_000) for _ in range(300)]
        order = draw.sample(range(300), 300)
        with lab.lease(sizes, [sizes[i] + 9 for i in order]) as lease:
            moves = [Move(source, 0, into, 9, sizes[source]) for into, source in enumerate(order)]
            lease.pull(draw.sample(moves, 300))

    def test_pieces_of_all_sizes_from_and_into_several_regions_arrive(self, lab: Lab) -> None:
        draw = random.Random(3)
        sizes = [3_000_001, 70_000, 1_000_003]
        moves = []
        for into, nbytes in enumerate(sizes):
            at = 0
            while at < nbytes:
                length = min(nbytes - at, int(2 ** draw.uniform(0, 21)))
                source = draw.choice([i for i in range(3) if sizes[i] >= length])
                moves.append(Move(source, draw.randint(0, sizes[source] - length), into, at, length))
                at += length + draw.randint(0, 50)
        with lab.lease(sizes, sizes) as lease:
            lease.pull(draw.sample(moves, len(moves)))

    # More than one pull, session and lease.

    def test_a_session_pulls_again_and_brings_what_the_seed_holds_by_then(self, lab: Lab) -> None:
        with lab.lease([50_000], [50_000]) as lease:
            lease.pull([Move(0, 0, 0, 0, 50_000)])
            lease.change_the_seed()
            lease.pull([Move(0, 10, 0, 20, 30_000)])
            lease.pull([])
            lease.pull([Move(0, 0, 0, 0, 50_000)])

    def test_two_leases_are_read_at_once(self, lab: Lab) -> None:
        nbytes = self.big // 4
        with lab.lease([nbytes], [nbytes]) as one, lab.lease([nbytes], [nbytes + 5]) as other:
            barrier = threading.Barrier(2)

            def read(lease: Lease, at: int) -> None:
                barrier.wait(self.seconds)
                lease.pull([Move(0, i, 0, at + i, nbytes // 16) for i in range(0, nbytes, nbytes // 16)])

            run_together(lambda: read(one, 0), lambda: read(other, 5))

    def test_two_leases_of_one_seed_are_read_in_turn(self, lab: Lab) -> None:
        with lab.lease([9000], [9000]) as one, lab.lease([4000], [4000], like=one) as other:
            one.pull([Move(0, 0, 0, 0, 4000)])
            other.pull([Move(0, 3000, 0, 0, 4000)])
            one.pull([Move(0, 4000, 0, 4000, 5000)])

    def test_a_new_lease_is_good_after_another_has_ended(self, lab: Lab) -> None:
        with lab.lease([9000], [9000]) as one:
            one.pull([Move(0, 0, 0, 0, 9000)])
        with lab.lease([9000], [9000], like=one) as other:
            other.pull([Move(0, 0, 0, 0, 9000)])

    # What each side says of itself.

    def test_facts_travel_and_say_that_the_two_sides_fit(self, lab: Lab) -> None:
        transport = self.make()
        regions = Memory(lab.setup.fork, [100, 200], 1).regions
        facts = dict(transport.facts(regions))
        assert msgpack.unpackb(msgpack.packb(facts), strict_map_key=True) == facts
        assert dict(transport.facts(regions)) == facts
        there = lab.seed([100, 200]).facts()
        assert transport.why_not(facts, there) is None
        assert transport.why_not(facts, there) is None

    def test_each_region_lies_within_what_covers_it(self, lab: Lab) -> None:
        memory = Memory(lab.setup.fork, [100, 200_000, 3], 1)
        covers, places = self.make().cover(memory.regions)
        by_id = {region.id: region for region in covers}
        assert len(by_id) == len(covers)
        assert len(places) == 3
        for region, place in zip(memory.regions, places, strict=True):
            cover = by_id[place.region]
            assert cover.address + place.offset == region.address
            assert place.offset + region.nbytes <= cover.nbytes
            assert cover.device == region.device

    # It ends when it is told to.

    def test_nothing_is_pulled_once_cancelled(self, lab: Lab) -> None:
        cancel = threading.Event()
        cancel.set()
        with lab.lease([self.big], [self.big]) as lease:
            lease.fail(lease.stripes(16), cancel=cancel)

    def test_a_pull_ends_soon_when_it_is_cancelled_from_done(self, lab: Lab) -> None:
        cancel = threading.Event()
        with lab.lease([self.big], [self.big]) as lease:
            started = time.monotonic()
            lease.fail(lease.stripes(64), cancel=cancel, then=lambda _: cancel.set(), seconds=MARGIN * self.seconds)
            assert time.monotonic() - started < self.seconds

    def test_a_pull_ends_soon_when_it_is_cancelled_while_nothing_comes(self, lab: Lab) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        cancel = threading.Event()
        try:
            with lab.lease([1000], [1000], serve=False, seconds=self.short) as lease:
                threading.Timer(0.1, cancel.set).start()
                started = time.monotonic()
                lease.fail([Move(0, 0, 0, 0, 1000)], cancel=cancel)
                assert time.monotonic() - started < self.seconds / 2
        except (TransportUnavailable, PeerUnreachable):
            pass  # it needs the seed already to open a session

    def test_nothing_is_pulled_past_the_deadline(self, lab: Lab) -> None:
        with lab.lease([self.big], [self.big]) as lease:
            lease.fail(lease.stripes(16), seconds=-1.0)

    def test_a_seed_that_does_not_serve_costs_no_more_than_the_deadline(self, lab: Lab) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        started = time.monotonic()
        try:
            with lab.lease([1000], [1000], serve=False, seconds=self.short) as lease:
                lease.fail([Move(0, 0, 0, 0, 1000)], seconds=self.short)
        except (TransportUnavailable, PeerUnreachable):
            pass  # it needs the seed already to open a session
        assert time.monotonic() - started < MARGIN * (2 * self.short + 1)

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_what_done_raises_ends_the_pull_and_reaches_the_caller(self, lab: Lab, kind: type[BaseException]) -> None:
        error = kind("of the caller's")

        def stumble(_: int) -> None:
            raise error

        with lab.lease([self.big], [self.big]) as lease, pytest.raises(kind) as caught:
            lease.attempt(lease.stripes(16), then=stumble)
        assert caught.value is error

    def test_closing_twice_and_after_a_failure_is_harmless(self, lab: Lab) -> None:
        with lab.lease([1000], [1000]) as lease:
            lease.fail([Move(0, 0, 0, 0, 1000)], seconds=-1.0)
            lease.session.close(time.monotonic() + self.seconds)
            lease.session.close(time.monotonic() + self.seconds)
        with lab.lease([1000], [1000]) as lease:
            lease.pull([Move(0, 0, 0, 0, 1000)])
            lease.session.close(time.monotonic() + self.seconds)
            lease.session.close(time.monotonic() + self.seconds)

    def test_an_offer_that_is_none_is_refused(self, lab: Lab) -> None:
        transport = self.make()
        regions, _ = transport.cover(Memory(lab.setup.fork, [5000], 1).regions)
        nobody = Speaker(lambda _: None)
        for offer in (b"", b"\0", b"nonsense", bytes(1000), b"\xff" * 64, b"{}", b"[]", b"\x80", b"\x90", b"\xc0"):
            with pytest.raises((ProtocolError, TransportUnavailable, PeerUnreachable)):
                transport.open(offer, SITE.host, [], regions, nobody, time.monotonic() + self.short)

    def test_a_lease_that_nobody_opens_ends(self, lab: Lab) -> None:
        transport = self.make()
        seed = lab.seed([5000])
        facts = transport.facts(Memory(lab.setup.fork, [5000], 1).regions)
        offer, _ = seed.export(dict(facts), self.seconds, True, Speaker(lambda _: None))
        lab.check(seed.end(offer.number, self.seconds))

    def test_a_lease_that_ends_before_it_is_served_ends(self, lab: Lab) -> None:
        transport = self.make()
        seed = lab.seed([5000])
        facts = transport.facts(Memory(lab.setup.fork, [5000], 1).regions)
        offer, _ = seed.export(dict(facts), self.seconds, False, Speaker(lambda _: None))
        lab.check(seed.end(offer.number, self.seconds))

    def test_a_pull_fails_by_the_deadline_when_the_lease_has_ended(self, lab: Lab) -> None:
        if self.one_sided:
            pytest.skip("the memory may be reached for as long as the fork has it open")
        with lab.lease([self.big], [self.big]) as lease:
            lease.pull([Move(0, 0, 0, 0, 1000)])
            lease.end_at_the_seed()
            started = time.monotonic()
            lease.fail(lease.stripes(16), seconds=self.short)
            assert time.monotonic() - started < MARGIN * (self.short + 1)

    def test_a_pull_fails_by_the_deadline_when_the_lease_ends_under_way(self, lab: Lab) -> None:
        if self.one_sided:
            pytest.skip("the memory may be reached for as long as the fork has it open")
        with lab.lease([self.big], [self.big]) as lease:
            once = Once(lease.end_at_the_seed)
            lease.fail(lease.stripes(64), then=once, seconds=self.under_way)
            assert once.called

    # Nothing outside the regions is read or written.

    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [(0, 1), (-1, 2), (-1000, 100_000), ((1 << 62), 8), ((1 << 64) - 8, 16)],
        ids=["behind", "across the edge", "far across the edge", "far away", "round the end of all numbers"],
    )
    def test_what_lies_beyond_a_seeds_region_is_refused(self, lab: Lab, offset: int, nbytes: int) -> None:
        with lab.lease([3000, 200_000], [200_000]) as lease:
            place, beyond = lease.theirs[0], lease.remote_end(0)
            start = beyond + offset if offset < 1 << 61 else offset
            bad = Copy(0, place.region, start, lease.ours[0].region, lease.ours[0].offset, nbytes)
            lease.fail_raw([bad])
        with lab.lease([3000], [3000], like=lease) as again:
            again.pull([Move(0, 0, 0, 0, 3000)])

    def test_a_region_the_seed_does_not_have_is_refused(self, lab: Lab) -> None:
        with lab.lease([3000], [3000]) as lease:
            unknown = 1 + max(remote.id for remote in lease.offer.remote)
            lease.fail_raw([Copy(0, unknown, 0, lease.ours[0].region, lease.ours[0].offset, 100)])
        with lab.lease([3000], [3000], like=lease) as again:
            again.pull([Move(0, 0, 0, 0, 3000)])

    @pytest.mark.parametrize("at", [2000, 1999, 1 << 40], ids=["behind", "across the edge", "far away"])
    def test_what_lies_beyond_our_own_region_is_refused(self, lab: Lab, at: int) -> None:
        with lab.lease([3000], [2000, 500]) as lease:
            into = lease.ours[0]
            edge = lease.our_end(0) - 2000 - into.offset  # 0, but for a transport that covers more
            theirs = lease.theirs[0]
            lease.fail_raw([Copy(0, theirs.region, theirs.offset, into.region, into.offset + edge + at, 100)])

    def test_a_region_of_ours_that_was_not_named_is_refused(self, lab: Lab) -> None:
        with lab.lease([3000], [2000]) as lease:
            lease.fail_raw([Copy(0, lease.theirs[0].region, lease.theirs[0].offset, 999_999, 0, 100)])

    def test_good_copies_beside_a_refused_one_are_whole_when_they_are_done(self, lab: Lab) -> None:
        with lab.lease([100_000], [100_000]) as lease:
            good = [lease.copy(move) for move in lease.stripes(10)]
            bad = Copy(0, lease.theirs[0].region, lease.remote_end(0), good[0].into, good[0].at, 1)
            lease.fail_raw([*good[:5], bad, *good[5:]], good=[*lease.stripes(10)[:5], None, *lease.stripes(10)[5:]])

    # The seed's process stops, or dies.

    @_spawned_only
    def test_a_seed_killed_under_way_fails_the_pull_by_the_deadline(self, lab: Lab) -> None:
        with lab.own_process() as helper, lab.lease([self.big], [self.big], gone=True) as lease:
            self._interrupt(lease, helper.kill)
            if not self.one_sided:
                started = time.monotonic()
                lease.fail([Move(0, 0, 0, 0, 1000)], seconds=self.short)
                assert time.monotonic() - started < MARGIN * (self.short + 1)

    @_spawned_only
    def test_a_seed_stopped_under_way_fails_the_pull_by_the_deadline_and_nothing_comes_late(self, lab: Lab) -> None:
        if not self.can_stop:
            pytest.skip("a stopped seed is not something this transport's library survives")
        with lab.own_process() as helper, lab.lease([self.big], [self.big]) as lease:
            undrained = self._interrupt(lease, helper.stop)
            lease.poison()
            helper.go_on()
            with lab.lease([self.big], [self.big], like=lease) as again:  # what was under way has time to come
                again.pull(again.stripes(16))
            assert lease.memory.wrong(but=undrained) is None

    # The fork's process stops, or dies.

    @_spawned_only
    def test_a_fork_killed_under_way_costs_its_seed_a_lease_and_nothing_else(self, lab: Lab, helper: Helper) -> None:
        self._lose_a_fork(lab, helper, Helper.kill)

    @_spawned_only
    def test_a_fork_stopped_under_way_costs_its_seed_a_lease_and_nothing_else(self, lab: Lab, helper: Helper) -> None:
        if not self.can_stop:
            pytest.skip("a stopped fork is not something this transport's library survives")
        self._lose_a_fork(lab, helper, Helper.stop)

    def _lose_a_fork(self, lab: Lab, other: Helper, lose: Callable[[Helper], None]) -> None:
        seed = LocalSeed(self.make(), lab.setup.seed, [self.big], 5)
        fork = Helper(type(self))
        try:
            lost = fork.fork(seed, lab.setup.fork, self.big, self.seconds, hold=True)
            assert fork.hear() == "under way"
            lose(fork)
            started = time.monotonic()
            lab.check(seed.end(lost, self.seconds))
            assert time.monotonic() - started < self.seconds
            good = other.fork(seed, lab.setup.fork, self.big, self.seconds, hold=False)
            assert other.hear() is None
            lab.check(seed.end(good, self.seconds))
            assert seed.wrong() is None
        finally:
            fork.close()

    def _interrupt(self, lease: Lease, happen: Callable[[], None]) -> Sequence[tuple[int, int]]:
        """Pull, and let something happen when the first copy is done. What may still be written, by address."""
        once = Once(happen)
        undrained: Sequence[tuple[int, int]] = ()
        try:
            lease.attempt(lease.stripes(64), then=once, seconds=self.under_way)
        except TransferFailed as error:
            undrained = error.undrained
            lease.undrained += undrained
        else:
            assert self.one_sided, "the pull succeeded without its seed"
        assert once.called
        return undrained
