"""Which memory of a seed stays registered between leases; the engine is a fake."""

import time
from collections.abc import Callable, Sequence

import pytest
from attrs import define, field

from tensorfork import Region, TransportUnavailable
from tensorfork.memory.allocations import Allocation
from tensorfork.transports.transfer_engine.registration_cache import RegistrationCache
from tensorfork.transports.transfer_engine.registrations import Registrations


@define(eq=False)
class Engine:
    """Registers memory, and lists the addresses that are registered."""

    mappings: dict[int, int] = field(factory=dict)
    registered: set[int] = field(factory=set)
    calls: int = 0
    before: Callable[[], object] = lambda: None
    fabric: str = "nvlink"
    nonce: bytes = b"12345678"
    port: int = 15000
    registrations: Registrations = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.registrations = Registrations(
            self.register, self.unregister, lambda region: self.mappings.get(region.address, 0)
        )

    def register(self, regions: Sequence[Region]) -> None:
        self.before()
        self.calls += 1
        self.registered |= {region.address for region in regions}

    def unregister(self, regions: Sequence[Region]) -> None:
        self.registered -= {region.address for region in regions}


def regions(*addresses: int) -> list[Region]:
    return [Region(i, address, 100, "cuda:0") for i, address in enumerate(addresses)]


def allocations(of: Sequence[Region], id: int = 1) -> list[Allocation]:
    return [Allocation(one.address, one.nbytes, 0, id, True) for one in of]


def soon() -> float:
    return time.monotonic() + 20


def test_the_second_lease_of_the_same_regions_registers_nothing_and_sends_the_same_offer() -> None:
    engine, cache, given = Engine(), RegistrationCache(), regions(100, 300)
    first, offer = cache.acquire(engine, given, allocations(given), soon())  # type: ignore[arg-type]
    second, again = cache.acquire(engine, given, allocations(given), soon())  # type: ignore[arg-type]
    assert engine.calls == 1
    assert again is offer
    first.release()
    second.release()
    assert engine.registered == {100, 300}
    cache.forget(given)
    assert engine.registered == set()
    assert len(engine.registrations) == 0


def test_a_lease_in_progress_keeps_its_registration_when_the_seed_closes() -> None:
    engine, cache, given = Engine(), RegistrationCache(), regions(100)
    lease, _ = cache.acquire(engine, given, allocations(given), soon())  # type: ignore[arg-type]
    cache.forget(given)
    assert engine.registered == {100}
    lease.release()
    assert engine.registered == set()


def test_a_seed_that_closes_unregisters_nothing_of_another_that_shares_memory_with_it() -> None:
    engine, cache = Engine(), RegistrationCache()
    target, draft = regions(100, 300), regions(300)
    for given in (target, draft):
        cache.acquire(engine, given, allocations(given), soon())[0].release()  # type: ignore[arg-type]
    cache.forget(draft)
    assert engine.registered == {100, 300}
    cache.forget(target)
    assert engine.registered == set()


def test_memory_that_was_mapped_anew_is_registered_again_with_another_offer() -> None:
    engine, cache, given = Engine(), RegistrationCache(), regions(100)
    lease, offer = cache.acquire(engine, given, allocations(given), soon())  # type: ignore[arg-type]
    lease.release()
    engine.mappings[100] = 2
    lease, again = cache.acquire(engine, given, allocations(given, 2), soon())  # type: ignore[arg-type]
    assert engine.calls == 2
    assert again != offer
    lease.release()
    cache.forget()
    assert engine.registered == set()


def test_nothing_stays_registered_for_a_seed_that_closed_during_registration() -> None:
    cache, given = RegistrationCache(), regions(100)
    engine = Engine(before=lambda: cache.forget(given))
    lease, _ = cache.acquire(engine, given, allocations(given), soon())  # type: ignore[arg-type]
    assert engine.registered == {100}
    lease.release()
    assert engine.registered == set()


def test_a_released_registration_cannot_be_shared() -> None:
    engine, given = Engine(), regions(100)
    registration = engine.registrations.acquire(given, soon())
    registration.release()
    with pytest.raises(TransportUnavailable, match="not registered any more"):
        registration.share(soon())
    assert len(engine.registrations) == 0
