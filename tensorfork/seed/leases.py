"""The seed's record of a lease, and the counts of what it has done."""

import threading

from attrs import define, field, frozen

from tensorfork.wire.listener import SeedChannel

MAX_LEASES = 64
"""Leases at once; further forks are refused as `BUSY`. Each lease has two threads and what its transport opens."""


@define(eq=False)
class Lease:
    """One fork's lease, at the seed.

    Attributes:
        id: what the fork's messages about the lease carry.
        peer: the fork's connection, as the listener names it.
        generation: the seed's generation when it was granted.
        expires: when it ends, by `time.monotonic()`.
        channel: the seed's end of its channel.
        ended: set when it ends, by either side or by time; its threads wait for that.
    """

    id: bytes
    peer: bytes
    generation: int
    expires: float
    channel: SeedChannel
    ended: threading.Event = field(factory=threading.Event)

    def end(self) -> None:
        """End the lease and its channel; its threads do the rest. A second call does nothing."""
        self.ended.set()
        self.channel.end()


@frozen
class SeedStats:
    """What a seed has done: leases granted, refused, running now and expired, and times its digests were computed."""

    granted: int
    refused: int
    running: int
    expired: int
    digested: int
