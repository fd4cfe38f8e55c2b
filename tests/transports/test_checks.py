"""A copy lies within the regions of both sides, or is refused before a byte moves."""

import pytest

from tensorfork import Copy, Region, RemoteRegion, TransferFailed
from tensorfork.memory.staging import HostAccess
from tensorfork.transports.checks import check_bounds
from tensorfork.transports.process_group import region_tensors

OUTSIDE = [(-1, 4), (0, -1), (0, 101), (97, 4), (101, 0)]


@pytest.mark.parametrize(("offset", "nbytes"), OUTSIDE)
def test_what_lies_outside_is_refused_on_either_side_whatever_moves_it(offset: int, nbytes: int) -> None:
    ours, remote = Region(1, 4096, 100, "cpu"), RemoteRegion(7, 100, "cpu")
    for copy in (Copy(0, 7, offset, 1, 0, nbytes), Copy(0, 7, 0, 1, offset, nbytes)):
        with pytest.raises(TransferFailed, match="outside"):
            check_bounds(copy, {7: remote}, {1: ours})
    assert not HostAccess([ours]).contains([(1, offset, nbytes)], 1000)
    assert not region_tensors.contains({1: ours}, (1, offset, nbytes), "cpu")


def test_what_lies_inside_is_not() -> None:
    ours, remote = Region(1, 4096, 100, "cpu"), RemoteRegion(7, 100, "cpu")
    for offset, nbytes in ((0, 0), (0, 100), (100, 0), (96, 4)):
        check_bounds(Copy(0, 7, offset, 1, offset, nbytes), {7: remote}, {1: ours})
        assert HostAccess([ours]).contains([(1, offset, nbytes)], 1000)
        assert region_tensors.contains({1: ours}, (1, offset, nbytes), "cpu")
