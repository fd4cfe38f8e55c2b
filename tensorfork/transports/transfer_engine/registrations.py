"""What is registered with one engine: stretches of memory with a count of their users.

Mooncake refuses what overlaps, and forgets an address for everybody at once. So a region that overlaps with what is
registered already shares that, and only what is missing is registered: several spans then make up a region, and a read
must not cross from one into the next.
"""

import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count, groupby
from typing import Any

from attrs import define, field

from tensorfork.errors import TransportUnavailable
from tensorfork.regions import Region

AT_ONCE = 256
"""Spans registered by one call; the deadline is looked at between two."""
MOST = 12_000
"""Spans of one engine. Mooncake's own limit is a little above 16,000, where every read begins to fail."""


@define(eq=False)
class _RegisteredSpan:
    """A registered stretch. `owners` keep it alive for as long as it is registered."""

    region: Region
    mapping: int
    number: int
    users: int = 0
    owners: list[Any] = field(factory=list)

    @property
    def start(self) -> int:
        return self.region.address

    @property
    def end(self) -> int:
        return self.region.address + self.region.nbytes


class Registration:
    """Regions that are registered for one user, until `release`; `used`, which is for `Registrations`, is None after that."""

    def __init__(self, spans: "Registrations", used: Sequence[_RegisteredSpan]) -> None:
        self._spans = spans
        self.used: Sequence[_RegisteredSpan] | None = sorted(used, key=lambda span: span.start)
        self._starts = [span.start for span in self.used]

    def cuts(self, region: Region) -> list[int]:
        """Offsets in a region at which one registration ends and the next begins."""
        first = bisect_right(self._starts, region.address)
        last = bisect_left(self._starts, region.address + region.nbytes)
        return [start - region.address for start in self._starts[first:last]]

    def shared(self, deadline: float) -> "Registration":
        """The same regions, held for one more user. Raises `TransportUnavailable` if this has been released."""
        return self._spans.share(self, deadline)

    def serial(self, *, by_mapping: bool) -> bytes:
        """Equal for two holdings of the same registrations; or, `by_mapping`, of the same memory."""
        digest = blake2b(digest_size=8)
        for span in self.used or ():
            digest.update(f"{span.start} {span.end} {span.mapping if by_mapping else span.number};".encode())
        return digest.digest()

    def is_stale(self) -> bool:
        """Whether some of its memory has been mapped anew since it was registered."""
        return self._spans.any_stale(self.used or ())

    def release(self) -> None:
        """Nothing of this is used any more; what nobody else uses is unregistered. A second time does nothing."""
        self._spans.release(self)


class Registrations:
    """The registrations of one engine.

    Args:
        register: registers regions of one device, all or none, or raises.
        unregister: the contrary.
        identify: a number that changes when a region's memory is mapped anew.
    """

    def __init__(
        self,
        register: Callable[[Sequence[Region]], None],
        unregister: Callable[[Sequence[Region]], None],
        identify: Callable[[Region], int],
    ) -> None:
        self._register, self._unregister, self._identify = register, unregister, identify
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._starts: list[int] = []
        self._spans: list[_RegisteredSpan] = []
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._spans)

    def hold(self, regions: Sequence[Region], deadline: float) -> Registration:
        """Have regions registered, each wholly, sharing what is.

        Raises `TransportUnavailable`, and registers nothing, where that cannot be done, or not by the deadline.
        """
        wanted = sorted((region for region in regions if region.nbytes), key=lambda one: one.address)
        with self._locked(deadline):
            fresh: list[_RegisteredSpan] = []
            try:
                for region in wanted:
                    fresh += self._fill(region)
                if len(self._spans) > MOST:
                    raise TransportUnavailable(
                        f"Mooncake serves at most {MOST:,} registrations, and this would be {len(self._spans):,}; "
                        "use zeromq, or put the model's tensors into fewer storages"
                    )
                self._register_all(fresh, deadline)
            except BaseException:
                self._drop(fresh)
                raise
            used: dict[int, _RegisteredSpan] = {}
            for region in wanted:
                for span in self._within(region):
                    used[id(span)] = span
                    span.owners.append(region.owner)
            for span in used.values():
                span.users += 1
            return Registration(self, list(used.values()))

    def share(self, holding: Registration, deadline: float) -> Registration:
        """See `Registration.shared`."""
        with self._locked(deadline):
            if holding.used is None:
                raise TransportUnavailable("the memory is not registered any more")
            for span in holding.used:
                span.users += 1
            return Registration(self, holding.used)

    def release(self, holding: Registration) -> None:
        """See `Registration.release`."""
        if self._pid != os.getpid():
            return  # after os.fork() it is the parent's, and the lock may be held by a thread that is not here
        with self._lock:
            used, holding.used = holding.used or [], None
            idle = []
            for span in used:
                span.users -= 1
                if not span.users:
                    idle.append(span)
            for _, spans in groupby(idle, key=lambda span: span.region.device):
                self._unregister([span.region for span in spans])
            self._drop(idle)

    def any_stale(self, used: Sequence[_RegisteredSpan]) -> bool:
        """See `Registration.is_stale`."""
        return any(self._is_stale(span) for span in used)

    def _fill(self, region: Region) -> list[_RegisteredSpan]:
        """New spans for what of a region is not registered, put in their places."""
        made = []
        at, end = region.address, region.address + region.nbytes
        mapping = self._identify(region)
        for span in self._within(region):
            if span.mapping != mapping:
                raise TransportUnavailable(
                    f"memory at {region.address:#x} was freed and mapped anew while it was registered for another "
                    "fork; wait for that to end, and publish again"
                )
            if at < span.start:
                made.append(self._put(region, at, span.start, mapping))
            at = span.end
        if at < end:
            made.append(self._put(region, at, end, mapping))
        return made

    def _put(self, region: Region, start: int, end: int, mapping: int) -> _RegisteredSpan:
        span = _RegisteredSpan(Region(region.id, start, end - start, region.device), mapping, next(self._numbers))
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._spans.insert(at, span)
        return span

    def _drop(self, spans: Sequence[_RegisteredSpan]) -> None:
        gone = set(map(id, spans))
        if gone:
            self._spans = [span for span in self._spans if id(span) not in gone]
            self._starts = [span.start for span in self._spans]

    def _within(self, region: Region) -> list[_RegisteredSpan]:
        """The spans that overlap with a region, in order."""
        first = max(0, bisect_right(self._starts, region.address) - 1)
        last = bisect_right(self._starts, region.address + region.nbytes - 1)
        return [span for span in self._spans[first:last] if span.end > region.address]

    def _register_all(self, spans: Sequence[_RegisteredSpan], deadline: float) -> None:
        done: list[Region] = []
        try:
            for device, same in groupby(spans, key=lambda span: span.region.device):
                regions = [span.region for span in same]
                for i in range(0, len(regions), AT_ONCE):
                    if time.monotonic() >= deadline:
                        raise TransportUnavailable(f"the memory on {device} was not registered by the deadline")
                    self._register(regions[i : i + AT_ONCE])
                    done += regions[i : i + AT_ONCE]
        except BaseException:
            for _, some in groupby(done, key=lambda region: region.device):
                self._unregister(list(some))
            raise

    def _is_stale(self, span: _RegisteredSpan) -> bool:
        try:
            return self._identify(span.region) != span.mapping
        except TransportUnavailable:
            return True  # it is not mapped at all

    @contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransportUnavailable("other memory was still being registered at the deadline")
        try:
            yield
        finally:
            self._lock.release()
