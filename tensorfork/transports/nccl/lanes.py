"""Which lane there is between two devices."""

from typing import Any

from tensorfork.transports.nccl import communicator
from tensorfork.transports.nccl.communicator import NcclLane
from tensorfork.transports.nccl.gloo import GlooLane
from tensorfork.transports.nccl.lane import Lane, Settings
from tensorfork.transports.nccl.memory import Memory


def make(
    pair: tuple[str, str],
    store: Any,
    rank: int,
    memory: Memory,
    settings: Settings,
    address: str,
    until: float,
) -> Lane:
    """A lane between the seed's device and the fork's, greeted. Raises RuntimeError (torch's) or our own errors."""
    lane: Lane
    if settings.over_nccl(pair):
        lane = NcclLane(store, rank, memory, pair[rank], settings.bucket, settings.ctas, until)
    else:
        lane = GlooLane(store, rank, memory, pair[rank], settings.bucket, address, until)
    try:
        lane.greet(until)
    except BaseException:
        lane.close()
        raise
    return lane


def rehearse(pair: tuple[str, str], rank: int, memory: Memory, settings: Settings) -> None:
    """Get this thread ready to begin parcels of such a lane."""
    if settings.over_nccl(pair):
        communicator.rehearse(memory, pair[rank])
