"""The part of the suite about the seed's memory: what was not published, and what is not there any more."""

from typing import ClassVar

import pytest

from tensorfork import Copy
from tensorfork.testing.fixtures import spawned_only
from tensorfork.testing.harness import Harness
from tensorfork.testing.lease_under_test import CallOnce, CopySpec


class SeedMemorySuite:
    """Tests for transports whose seed answers requests. One whose forks read by themselves cannot tell what was
    published within a region, nor what has gone; see `TransportSuite.one_sided`.
    """

    one_sided: ClassVar[bool]
    big: ClassVar[int]

    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [(0, 1), (99, 2), (0, 3000), (199, 2), (250, 10), (299, 2), (1999, 2), (2000, 1), (150, 200)],
        ids=["before", "from before", "everything", "behind", "between", "into", "beyond", "at the end", "across"],
    )
    def test_bytes_beside_what_was_published_are_refused(self, harness: Harness, offset: int, nbytes: int) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        with harness.lease([3000], [3000], published=[(100, 200), (300, 2000)]) as lease:
            theirs, ours = lease.seed_places[0], lease.fork_places[0]
            lease.fail_raw([Copy(0, theirs.region, theirs.offset + offset, ours.region, ours.offset, nbytes)])
        with harness.lease([3000], [3000], same_seed=lease) as again:
            again.pull([CopySpec(0, 100, 0, 0, 100), CopySpec(0, 300, 0, 500, 1700), CopySpec(0, 150, 0, 200, 50)])

    @spawned_only
    def test_memory_that_is_gone_is_an_error_and_not_the_end_of_the_seed(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        if harness.setup.seed_device != "cpu":
            pytest.skip("memory on the CPU is unmapped")
        with harness.lease([self.big], [self.big]) as lease:
            lease.seed.unmap()
            try:
                lease.fail(lease.stripes(16))
            finally:
                lease.seed.map()
        with harness.lease([self.big], [self.big], same_seed=lease) as again:
            again.pull(again.stripes(16))

    @spawned_only
    def test_memory_that_goes_under_way_is_an_error_and_not_the_end_of_the_seed(self, harness: Harness) -> None:
        if self.one_sided:
            pytest.skip("the seed takes no part in a pull")
        if harness.setup.seed_device != "cpu":
            pytest.skip("memory on the CPU is unmapped")
        with harness.lease([self.big], [self.big]) as lease:
            once = CallOnce(lease.seed.unmap)
            try:
                lease.fail(lease.stripes(64), then=once)
            finally:
                lease.seed.map()
            assert once.called
        with harness.lease([self.big], [self.big], same_seed=lease) as again:
            again.pull(again.stripes(16))
