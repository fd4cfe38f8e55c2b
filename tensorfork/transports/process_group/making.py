"""Which lane there is between two devices."""

from typing import Any

from tensorfork.transports.process_group import nccl
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import PairGroup, Settings
from tensorfork.transports.process_group.region_tensors import RegionTensors


def make_group(
    pair: tuple[str, str],
    store: Any,
    rank: int,
    memory: RegionTensors,
    settings: Settings,
    address: str,
    until: float,
) -> PairGroup:
    """A lane between the seed's device and the fork's, greeted. Raises RuntimeError (torch's) or our own errors."""
    lane: PairGroup
    if settings.over_nccl(pair):
        lane = NcclGroup(store, rank, memory, pair[rank], settings.bucket, settings.ctas, until)
    else:
        lane = GlooGroup(store, rank, memory, pair[rank], settings.bucket, address, until)
    try:
        lane.greet(until)
    except BaseException:
        lane.close()
        raise
    return lane


def warm_up_thread(pair: tuple[str, str], rank: int, memory: RegionTensors, settings: Settings) -> None:
    """Get this thread ready to begin parcels of such a lane."""
    if settings.over_nccl(pair):
        nccl.warm_up_thread(memory, pair[rank])
