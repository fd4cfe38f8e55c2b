"""Chooses between NCCL and gloo for a pair of devices."""

from typing import Any

from tensorfork.transports.process_group import nccl
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.nccl import NcclGroup
from tensorfork.transports.process_group.pair_group import PairGroup, Settings
from tensorfork.transports.process_group.region_tensors import RegionTensors


def create_group(
    pair: tuple[str, str],
    store: Any,
    rank: int,
    regions: RegionTensors,
    settings: Settings,
    address: str,
    deadline: float,
) -> PairGroup:
    """Create one side of a group between the seed's device and the fork's, and do its handshake.

    Args:
        pair: the seed's device and the fork's.
        store: where the two sides find each other.
        rank: `SEED` or `FORK`.
        regions: the regions of this side.
        settings: the settings of the lease.
        address: the address that gloo listens at.
        deadline: by when.

    Raises RuntimeError (torch's) or our own errors, and leaves no group behind.
    """
    group: PairGroup
    if settings.uses_nccl(pair):
        group = NcclGroup(store, rank, regions, pair[rank], settings.bucket, settings.ctas, deadline)
    else:
        group = GlooGroup(store, rank, regions, pair[rank], settings.bucket, address, deadline)
    try:
        group.handshake(deadline)
    except BaseException:
        group.close()
        raise
    return group


def warm_up_thread(pair: tuple[str, str], rank: int, regions: RegionTensors, settings: Settings) -> None:
    """Prepare this thread to start batches of such a group."""
    if settings.uses_nccl(pair):
        nccl.warm_up_thread(regions, pair[rank])
