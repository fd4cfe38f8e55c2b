"""A one-sided transport between forks and a seed of this process: the fork reads the seed's memory by itself."""

import ctypes
import struct
import time
from collections.abc import Callable, Sequence
from threading import Event

from tensorfork import Channel, Copy, Export, Facts, Region, RemoteRegion, Session, Site, Transport
from tensorfork.transports.checks import LeaseEnd, check_going_on
from tensorfork.transports.rate_limit import RateLimiter

_PLACE = struct.Struct("<QQ")


class OneSided(Transport):
    """`between` is called before each copy with what the fork may read then, in bytes a second."""

    name = "one_sided"
    rate_limited_by = "fork"
    piece = 64 << 10

    def __init__(self, between: Callable[[float | None], object] = lambda rate: None) -> None:
        self._between = between

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        return _Offered(b"".join(_PLACE.pack(region.id, region.address) for region in regions))

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> Session:
        return _Reading(dict(_PLACE.iter_unpack(offer)), regions, channel, self._between)


class _Offered(Export):
    def __init__(self, offer: bytes) -> None:
        self.offer = offer

    def serve(self, channel: Channel) -> None:
        """It takes no part."""

    def close(self, deadline: float) -> bool:
        return True  # the tests' forks read nothing after a pull


class _Reading(Session):
    fabric = "memory"

    def __init__(
        self,
        theirs: dict[int, int],
        regions: Sequence[Region],
        channel: Channel,
        between: Callable[[float | None], object],
    ) -> None:
        self._theirs, self._ours = theirs, {region.id: region.address for region in regions}
        self._channel, self._between, self._end = channel, between, LeaseEnd(channel)
        self.limiter = RateLimiter(lambda: channel.rate_limit)

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        for i, copy in enumerate(copies):
            self._between(self._channel.rate_limit)
            while True:
                check_going_on(deadline, cancel)
                self._end.check()
                if not (seconds := self.limiter.try_spend(copy.nbytes)):
                    break
                time.sleep(min(seconds, 0.005))
            ctypes.memmove(self._ours[copy.into] + copy.at, self._theirs[copy.region] + copy.offset, copy.nbytes)
            done(i)

    def close(self, deadline: float) -> None:
        """Nothing to release."""
