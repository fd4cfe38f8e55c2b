"""Leases: who holds one, until when."""

import threading

from attrs import define, field, frozen

from tensorfork.wire.listener import SeedChannel


@define(eq=False)
class Lease:
    """One fork's lease. `ended` is what its threads wait for."""

    id: bytes
    peer: bytes
    generation: int
    expires: float
    channel: SeedChannel
    ended: threading.Event = field(factory=threading.Event)

    def end(self) -> None:
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
