"""The checks that sessions make before and while they move bytes."""

import time
from collections.abc import Mapping
from threading import Event

from tensorfork.errors import LeaseEnded, PeerRefused, PeerUnreachable, TransferFailed
from tensorfork.regions import Copy, Region, RemoteRegion, contains
from tensorfork.transports.base import Channel

LEASE_POLL_SECONDS = 0.02
"""Time between two looks at a lease's channel: some 30 µs each."""
LEASE_ENDED = "the seed ended the lease"


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


class LeaseEnd:
    """Looks now and then whether the seed has said on a lease's channel that it ends the lease.

    For a session that reads by itself, while the seed has nothing else to say.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel, self._next_look = channel, 0.0

    def check(self) -> None:
        """Raise `TransferFailed` if the seed has ended the lease. A seed that is gone is not noticed here."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LEASE_POLL_SECONDS
        try:
            self._channel.recv(now)
        except (LeaseEnded, PeerRefused) as error:
            raise TransferFailed(f"{LEASE_ENDED}: {error}") from error
        except PeerUnreachable:
            return  # nothing has come
        raise TransferFailed(LEASE_ENDED)
