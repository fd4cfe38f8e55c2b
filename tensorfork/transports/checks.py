"""The checks that sessions make before and while they move bytes."""

import time
from collections.abc import Mapping
from threading import Event

from tensorfork.errors import TransferFailed
from tensorfork.regions import Copy, Region, RemoteRegion, contains


def check_bounds(copy: Copy, remote: Mapping[int, RemoteRegion], ours: Mapping[int, Region]) -> None:
    """Raise `TransferFailed` unless a copy lies within one leased region and within one of ours, both given by id."""
    source, into = remote.get(copy.region), ours.get(copy.into)
    if source is None or into is None:
        raise TransferFailed(f"{copy} names a region that was not leased")
    if not (contains(source, copy.offset, copy.nbytes) and contains(into, copy.at, copy.nbytes)):
        raise TransferFailed(f"{copy} lies outside the leased regions")


def check_going_on(deadline: float, cancel: Event, source: object = None) -> None:
    """Raise `TransferFailed` once the transfer is cancelled, or its deadline has passed. The message names `source`."""
    if cancel.is_set():
        raise TransferFailed("the transfer was cancelled")
    if time.monotonic() >= deadline:
        sender = "" if source is None else f" from {source}"
        raise TransferFailed(f"not everything{sender} had arrived by the deadline")
