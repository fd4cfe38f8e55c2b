"""What every session checks before and while it moves bytes."""

import time
from collections.abc import Mapping
from threading import Event

from tensorfork.errors import TransferFailed
from tensorfork.regions import Copy, Region, RemoteRegion


def check_bounds(copy: Copy, remote: Mapping[int, RemoteRegion], ours: Mapping[int, Region]) -> None:
    """Raise `TransferFailed` unless a copy lies within one leased region and one of ours."""
    source, into = remote.get(copy.region), ours.get(copy.into)
    if source is None or into is None:
        raise TransferFailed(f"{copy} names a region that was not leased")
    if (
        min(copy.offset, copy.at, copy.nbytes) < 0
        or copy.offset + copy.nbytes > source.nbytes
        or copy.at + copy.nbytes > into.nbytes
    ):
        raise TransferFailed(f"{copy} lies outside the leased regions")


def check_going_on(deadline: float, cancel: Event) -> None:
    """Raise `TransferFailed` once the transfer is cancelled, or its deadline has passed."""
    if cancel.is_set():
        raise TransferFailed("the transfer was cancelled")
    if time.monotonic() >= deadline:
        raise TransferFailed("not everything had arrived by the deadline")
