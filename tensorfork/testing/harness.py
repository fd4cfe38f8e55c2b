"""What the suite's tests are given: a harness, which creates seeds and leases, and ends what it created."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from attrs import frozen

from tensorfork import Transport
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.testing.helper_process import HelperProcess
from tensorfork.testing.lease_under_test import LeaseUnderTest
from tensorfork.testing.local_seed import SITE, LeaseEnding, LocalSeed, SeedSide

SAME_PROCESS, SPAWNED_PROCESS = "within one process", "from a spawned process"
"""Where the seed is; the values of `TransportSuite.ways`."""


class SuiteSettings(Protocol):
    """What a harness needs of a `TransportSuite`."""

    @property
    def seconds(self) -> float:
        """A deadline that any pull of the suite meets."""

    def make(self) -> Transport:
        """A new transport."""


@frozen
class Setup:
    """Where the seed is, and the devices on which the two sides have their memory."""

    way: str
    seed_device: str
    fork_device: str

    def __str__(self) -> str:
        devices = self.seed_device, self.fork_device
        return self.way if devices == ("cpu", "cpu") else f"{self.way} {self.seed_device} to {self.fork_device}"


class Harness:
    """Creates seeds' sides and leases for one test."""

    def __init__(self, suite: SuiteSettings, setup: Setup, helper_process: HelperProcess | None) -> None:
        self.suite, self.setup, self._helper_process = suite, setup, helper_process
        self._numbers = iter(range(1, 1_000_000))

    def seed(
        self, sizes: Sequence[int], number: int | None = None, published: Sequence[tuple[int, int]] | None = None
    ) -> SeedSide:
        """A seed's side with regions of these sizes, and the contents of this number or a new one.

        `published` are the ranges of each region that the fork may read; by default all.
        """
        number = next(self._numbers) if number is None else number
        if self._helper_process is not None:
            return self._helper_process.make_seed(self.setup.seed_device, sizes, number, published)
        return LocalSeed(self.suite.make(), self.setup.seed_device, sizes, number, published)

    @contextmanager
    def own_process(self) -> Iterator[HelperProcess]:
        """Inside, seeds are in a process of this test's own, which it may stop or kill."""
        shared, self._helper_process = self._helper_process, HelperProcess(type(self.suite))
        try:
            yield self._helper_process
        finally:
            self._helper_process.close()
            self._helper_process = shared

    @contextmanager
    def lease(
        self,
        seed_sizes: Sequence[int],
        fork_sizes: Sequence[int],
        *,
        same_seed: LeaseUnderTest | None = None,
        serve: bool = True,
        seconds: float | None = None,
        seed_dies: bool = False,
        published: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[LeaseUnderTest]:
        """A lease on a new seed with regions of `seed_sizes`, or on the seed of another lease; opened for a fork with
        regions of `fork_sizes`.

        Without `serve` the seed does not serve it. With `seed_dies` the lease is not ended at the seed afterwards.
        `published` are the ranges of a new seed's regions that may be read; by default all.
        """
        seconds = self.suite.seconds if seconds is None else seconds
        number = next(self._numbers)
        seed = self.seed(seed_sizes, number, published) if same_seed is None else same_seed.seed
        expected = contents(number, seed_sizes) if same_seed is None else same_seed.expected
        transport = self.suite.make()
        memory = GuardedMemory(self.setup.fork_device, fork_sizes, next(self._numbers))
        facts = dict(transport.facts(memory.regions))
        assert transport.why_not(facts, seed.facts()) is None
        channel = QueueChannel(lambda _: None)
        granted = seed.grant_lease(facts, seconds, serve, channel)
        channel.seed = granted.seed
        lease = LeaseUnderTest(
            self.suite.seconds, seed, granted, memory, expected, transport.piece, next(self._numbers)
        )
        try:
            regions, places = transport.cover(memory.regions)
            lease.fork_places, lease.fork_regions = places, regions
            lease.session = transport.open(
                granted.offer, SITE.host, granted.remote, regions, channel, time.monotonic() + seconds
            )
            try:
                lease.session.ready(time.monotonic() + seconds)
                yield lease
            finally:
                lease.session.close(time.monotonic() + seconds)
        finally:
            if not seed_dies and not lease.ended:
                lease.end_at_seed()
        assert memory.first_difference(ignore=lease.undrained) is None

    def check_ending(self, ending: LeaseEnding) -> None:
        """Fail unless `serve` returned without an error."""
        assert ending.serve_error is None, f"serve failed:\n{ending.serve_error}"
        assert ending.serve_returned, "serve did not return when the lease ended"
