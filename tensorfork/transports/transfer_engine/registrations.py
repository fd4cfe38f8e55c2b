"""What is registered with one engine: spans of memory, each with a count of its users.

Mooncake refuses to register memory that overlaps with registered memory, and unregisters an address for all users at
once. So a region that overlaps with registered spans shares them, and only the rest of it is registered. Such a region
consists of several spans, and a read must not cross from one into the next.
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

from attrs import define

from tensorfork.errors import TransportUnavailable
from tensorfork.regions import Region

SPANS_PER_CALL = 256
"""Spans registered by one call of Mooncake. The deadline is checked between two calls."""
MAX_SPANS = 12_000
"""Spans of one engine. Mooncake's own limit is a little above 16,000, where every read begins to fail."""


@define(eq=False)
class _RegisteredSpan:
    """A registered stretch of memory.

    Attributes:
        region: its address, length and device.
        mapping_id: of the memory when it was registered; another one now means that it was mapped anew.
        number: no two registrations of an engine have the same.
        users: how many `Registration`s include it.
    """

    region: Region
    mapping_id: int
    number: int
    users: int = 0

    @property
    def start(self) -> int:
        return self.region.address

    @property
    def end(self) -> int:
        return self.region.address + self.region.nbytes


class Registration:
    """Regions that are registered for one user, until `release`.

    `spans` is for `Registrations`, and `owners` keeps the memory alive; both are None after the release. So memory is
    free once those who use it have released it, whoever else uses spans that it lies in.
    """

    def __init__(self, registrations: "Registrations", spans: Sequence[_RegisteredSpan], owners: Sequence[Any]) -> None:
        self._registrations = registrations
        self.owners: Sequence[Any] | None = owners
        self.spans: Sequence[_RegisteredSpan] | None = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in self.spans]

    def boundaries(self, region: Region) -> list[int]:
        """Offsets in a region at which one registered span ends and the next begins."""
        first = bisect_right(self._starts, region.address)
        last = bisect_left(self._starts, region.address + region.nbytes)
        return [start - region.address for start in self._starts[first:last]]

    def share(self, deadline: float) -> "Registration":
        """The same regions for one more user. Raises `TransportUnavailable` if this has been released."""
        return self._registrations.share(self, deadline)

    def fingerprint(self, *, by_mapping: bool) -> bytes:
        """8 bytes that are equal for the same registered spans; or, `by_mapping`, for spans of the same memory."""
        digest = blake2b(digest_size=8)
        for span in self.spans or ():
            digest.update(f"{span.start} {span.end} {span.mapping_id if by_mapping else span.number};".encode())
        return digest.digest()

    def is_stale(self) -> bool:
        """Whether some of its memory has been mapped anew since it was registered."""
        return self._registrations.any_stale(self.spans or ())

    def release(self) -> None:
        """End this use. Spans without another user are unregistered. A second call does nothing."""
        self._registrations.release(self)


class Registrations:
    """The registrations of one engine. For any thread.

    Args:
        register: registers regions of one device, all or none, or raises.
        unregister: unregisters regions of one device.
        mapping_id: a number that changes when a region's memory is mapped anew.
    """

    def __init__(
        self,
        register: Callable[[Sequence[Region]], None],
        unregister: Callable[[Sequence[Region]], None],
        mapping_id: Callable[[Region], int],
    ) -> None:
        self._register, self._unregister, self._mapping_id = register, unregister, mapping_id
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._starts: list[int] = []
        self._spans: list[_RegisteredSpan] = []
        self._numbers = count(1)

    def __len__(self) -> int:
        return len(self._spans)

    def acquire(self, regions: Sequence[Region], deadline: float) -> Registration:
        """Register the regions, sharing what of them is registered already.

        Raises `TransportUnavailable`, and registers nothing, where that cannot be done, or not by the deadline.
        """
        wanted = sorted((region for region in regions if region.nbytes), key=lambda one: one.address)
        with self._locked(deadline):
            fresh: list[_RegisteredSpan] = []
            try:
                for region in wanted:
                    fresh += self._insert_missing(region)
                if len(self._spans) > MAX_SPANS:
                    raise TransportUnavailable(
                        f"Mooncake serves at most {MAX_SPANS:,} registrations, and this would be {len(self._spans):,}; "
                        "use zeromq, or put the model's tensors into fewer storages"
                    )
                self._register_all(fresh, deadline)
            except BaseException:
                self._remove(fresh)
                raise
            used: dict[int, _RegisteredSpan] = {}
            for region in wanted:
                for span in self._overlapping(region):
                    used[id(span)] = span
            for span in used.values():
                span.users += 1
            return Registration(self, list(used.values()), [region.owner for region in wanted])

    def share(self, registration: Registration, deadline: float) -> Registration:
        """See `Registration.share`."""
        with self._locked(deadline):
            if registration.spans is None:
                raise TransportUnavailable("the memory is not registered any more")
            for span in registration.spans:
                span.users += 1
            return Registration(self, registration.spans, registration.owners or ())

    def release(self, registration: Registration) -> None:
        """See `Registration.release`."""
        if self._pid != os.getpid():
            return  # after os.fork() the registration is the parent's; a thread that is not here may hold the lock
        with self._lock:
            spans, registration.spans = registration.spans or [], None
            unused = []
            for span in spans:
                span.users -= 1
                if not span.users:
                    unused.append(span)
            for _, group in groupby(unused, key=lambda span: span.region.device):
                self._unregister([span.region for span in group])
            self._remove(unused)
            registration.owners = None

    def any_stale(self, spans: Sequence[_RegisteredSpan]) -> bool:
        """See `Registration.is_stale`."""
        return any(self._is_stale(span) for span in spans)

    def _insert_missing(self, region: Region) -> list[_RegisteredSpan]:
        """Insert spans for the parts of a region that are not registered, and return them."""
        inserted = []
        at, end = region.address, region.address + region.nbytes
        mapping_id = self._mapping_id(region)
        for span in self._overlapping(region):
            if span.mapping_id != mapping_id:
                raise TransportUnavailable(
                    f"memory at {region.address:#x} was freed and mapped anew while it was registered for another "
                    "fork; wait for that to end, and publish again"
                )
            if at < span.start:
                inserted.append(self._insert(region, at, span.start, mapping_id))
            at = span.end
        if at < end:
            inserted.append(self._insert(region, at, end, mapping_id))
        return inserted

    def _insert(self, region: Region, start: int, end: int, mapping_id: int) -> _RegisteredSpan:
        span = _RegisteredSpan(Region(region.id, start, end - start, region.device), mapping_id, next(self._numbers))
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._spans.insert(at, span)
        return span

    def _remove(self, spans: Sequence[_RegisteredSpan]) -> None:
        removed = set(map(id, spans))
        if removed:
            self._spans = [span for span in self._spans if id(span) not in removed]
            self._starts = [span.start for span in self._spans]

    def _overlapping(self, region: Region) -> list[_RegisteredSpan]:
        """The spans that overlap with a region, in order."""
        first = max(0, bisect_right(self._starts, region.address) - 1)
        last = bisect_right(self._starts, region.address + region.nbytes - 1)
        return [span for span in self._spans[first:last] if span.end > region.address]

    def _register_all(self, spans: Sequence[_RegisteredSpan], deadline: float) -> None:
        done: list[Region] = []
        try:
            for device, group in groupby(spans, key=lambda span: span.region.device):
                regions = [span.region for span in group]
                for i in range(0, len(regions), SPANS_PER_CALL):
                    if time.monotonic() >= deadline:
                        raise TransportUnavailable(f"the memory on {device} was not registered by the deadline")
                    self._register(regions[i : i + SPANS_PER_CALL])
                    done += regions[i : i + SPANS_PER_CALL]
        except BaseException:
            for _, registered in groupby(done, key=lambda region: region.device):
                self._unregister(list(registered))
            raise

    def _is_stale(self, span: _RegisteredSpan) -> bool:
        try:
            return self._mapping_id(span.region) != span.mapping_id
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
