"""What of a seed's memory stays registered from one lease to the next."""

import threading
from bisect import bisect_left
from collections.abc import Sequence

from attrs import define

from tensorfork.errors import TransportUnavailable
from tensorfork.memory.allocations import Allocation
from tensorfork.regions import Region
from tensorfork.transports.transfer_engine.engine import Engine
from tensorfork.transports.transfer_engine.export import offer
from tensorfork.transports.transfer_engine.registrations import Registration


@define(eq=False)
class _Entry:
    """Regions that are held with an engine, and what each fork is told of them."""

    engine: Engine
    regions: Sequence[Region]
    blocks: Sequence[Allocation]
    holding: Registration
    offer: bytes


class RegistrationCache:
    """A table of it, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._forgotten = 0

    def hold(
        self, engine: Engine, regions: Sequence[Region], blocks: Sequence[Allocation], deadline: float
    ) -> tuple[Registration, bytes]:
        """Regions held for a lease, and what its fork is told; they stay held until `forget`. The same regions again,
        in the same blocks, cost next to nothing. What has been mapped anew since it was kept is let go of.
        """
        with self._lock:
            before, entries = self._forgotten, list(self._entries)
        for entry in entries:
            if entry.engine is engine and entry.regions is regions and entry.blocks == blocks:
                try:
                    return entry.holding.shared(deadline), entry.offer
                except TransportUnavailable:
                    break  # it has just been forgotten
        self._let_go([entry for entry in entries if entry.holding.is_stale()])
        holding = engine.spans.hold(regions, deadline)
        try:
            told = offer(engine, holding, regions)
            with self._lock:
                if self._forgotten == before:  # else a seed has closed meanwhile, perhaps this one: keep nothing
                    self._entries.append(_Entry(engine, regions, blocks, holding.shared(deadline), told))
        except BaseException:
            holding.release()
            raise
        return holding, told

    def forget(self, regions: Sequence[Region] | None = None) -> None:
        """Let go of what is kept for these alone; of all, by default. Leases under way keep what they hold."""
        addresses = None if regions is None else sorted(region.address for region in regions)
        with self._lock:
            self._forgotten += 1
            entries = list(self._entries)
        self._let_go([one for one in entries if addresses is None or _is_for(one.regions, addresses)])

    def _let_go(self, entries: Sequence[_Entry]) -> None:
        with self._lock:
            gone = [entry for entry in entries if entry in self._entries]
            for entry in gone:
                self._entries.remove(entry)
        for entry in gone:
            entry.holding.release()


def _is_for(held: Sequence[Region], addresses: Sequence[int]) -> bool:
    """Whether there is one of the addresses in each of the held regions."""
    return all(
        bisect_left(addresses, one.address) < bisect_left(addresses, one.address + one.nbytes)
        for one in held
        if one.nbytes
    )
