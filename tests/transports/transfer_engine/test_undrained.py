"""Reads that are still running after a pull has failed."""

import threading
import time
from collections.abc import Iterator

import pytest

from tensorfork import TransferFailed
from tensorfork.transports.transfer_engine.engine import ReadStatus
from tensorfork.transports.transfer_engine.undrained import InFlightRead, UndrainedReads

NEVER, SOON = 0.0, 30.0


def soon() -> float:
    return time.monotonic() + SOON


class Reads:
    """Reads that are over when a test says so. As with Mooncake, the status of one that is over is asked for once."""

    def __init__(self) -> None:
        self.over: dict[int, ReadStatus] = {}
        self.reported: set[int] = set()

    def status(self, transfer_id: int) -> ReadStatus:
        assert transfer_id not in self.reported
        if transfer_id in self.over:
            self.reported.add(transfer_id)
        return self.over.get(transfer_id, ReadStatus.RUNNING)


@pytest.fixture
def undrained() -> Iterator[UndrainedReads]:
    undrained = UndrainedReads()
    yield undrained
    assert undrained.ranges() == []


def test_memory_is_kept_until_every_read_into_it_is_over(undrained: UndrainedReads) -> None:
    reads, drained = Reads(), threading.Event()
    undrained.add([InFlightRead(0, 100, 10, 1), InFlightRead(1, 200, 10, 2)], reads.status, drained.set, object())
    reads.over[2] = ReadStatus.FAILED
    undrained.wait([(200, 10)], soon(), lambda: False)
    assert undrained.ranges() == [(100, 10)]
    assert not drained.is_set()
    with pytest.raises(TransferFailed, match="may still be writing"):
        undrained.wait([(50, 51)], NEVER, lambda: False)
    with pytest.raises(TransferFailed, match="cancelled"):
        undrained.wait([(109, 1)], soon(), lambda: True)
    undrained.wait([(50, 50), (110, 10)], NEVER, lambda: False)
    reads.over[1] = ReadStatus.DONE
    undrained.wait([(100, 10)], soon(), lambda: False)
    assert drained.wait(SOON)


def test_a_read_whose_poll_was_interrupted_is_not_polled_again_and_counts_as_running() -> None:
    read = InFlightRead(0, 100, 10, 1)

    def interrupted(transfer_id: int) -> ReadStatus:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read.poll(interrupted)
    assert read.poll(interrupted) is ReadStatus.RUNNING
