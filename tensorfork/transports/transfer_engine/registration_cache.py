"""The part of a seed's memory that stays registered between leases."""

import threading
from bisect import bisect_left
from collections.abc import Sequence

from attrs import define

from tensorfork.errors import TransportUnavailable
from tensorfork.memory.allocations import Allocation
from tensorfork.regions import Region
from tensorfork.transports.transfer_engine.engine import Engine
from tensorfork.transports.transfer_engine.export import pack_offer
from tensorfork.transports.transfer_engine.registrations import Registration


@define(eq=False)
class _Entry:
    """Regions that stay registered with an engine, and the offer that each fork is sent for them."""

    engine: Engine
    regions: Sequence[Region]
    allocations: Sequence[Allocation]
    registration: Registration
    offer: bytes


class RegistrationCache:
    """The registrations, with their offers, that one transport keeps. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._forget_count = 0

    def acquire(
        self, engine: Engine, regions: Sequence[Region], allocations: Sequence[Allocation], deadline: float
    ) -> tuple[Registration, bytes]:
        """A registration of the regions for one lease, and the offer for its fork.

        The regions stay registered after the lease, until `forget`. The same regions again, in the same allocations,
        cost next to nothing. Cached registrations of memory that has been mapped anew since are dropped first.

        Raises as `Registrations.acquire` does.
        """
        with self._lock:
            forget_count, entries = self._forget_count, list(self._entries)
        for entry in entries:
            if entry.engine is engine and entry.regions is regions and entry.allocations == allocations:
                try:
                    return entry.registration.share(deadline), entry.offer
                except TransportUnavailable:
                    break  # `forget` has just dropped it
        self._drop([entry for entry in entries if entry.registration.is_stale()])
        registration = engine.registrations.acquire(regions, deadline)
        try:
            offer = pack_offer(engine, registration, regions)
            with self._lock:
                if self._forget_count == forget_count:  # else a seed, perhaps this one, has closed: do not cache
                    self._entries.append(_Entry(engine, regions, allocations, registration.share(deadline), offer))
        except BaseException:
            registration.release()
            raise
        return registration, offer

    def forget(self, regions: Sequence[Region] | None = None) -> None:
        """Drop the entries whose regions are all among these; without an argument, drop all.

        Memory that a lease still uses stays registered until that lease ends.
        """
        addresses = None if regions is None else sorted(region.address for region in regions)
        with self._lock:
            self._forget_count += 1
            entries = list(self._entries)
        self._drop([entry for entry in entries if addresses is None or _all_contain(entry.regions, addresses)])

    def _drop(self, entries: Sequence[_Entry]) -> None:
        with self._lock:
            dropped = [entry for entry in entries if entry in self._entries]
            for entry in dropped:
                self._entries.remove(entry)
        for entry in dropped:
            entry.registration.release()


def _all_contain(regions: Sequence[Region], addresses: Sequence[int]) -> bool:
    """Whether each of the regions contains one of the addresses."""
    return all(
        bisect_left(addresses, one.address) < bisect_left(addresses, one.address + one.nbytes)
        for one in regions
        if one.nbytes
    )
