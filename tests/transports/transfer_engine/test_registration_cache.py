"""What of a seed's memory stays registered with Mooncake from one lease to the next; the engine is a fake."""

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
    """Registers, and says what is registered."""

    mappings: dict[int, int] = field(factory=dict)
    registered: set[int] = field(factory=set)
    calls: int = 0
    before: Callable[[], object] = lambda: None
    fabric: str = "nvlink"
    nonce: bytes = b"12345678"
    port: int = 15000
    spans: Registrations = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.spans = Registrations(self.register, self.unregister, lambda region: self.mappings.get(region.address, 0))

    def register(self, regions: Sequence[Region]) -> None:
        self.before()
        self.calls += 1
        self.registered |= {region.address for region in regions}

    def unregister(self, regions: Sequence[Region]) -> None:
        self.registered -= {region.address for region in regions}


def regions(*addresses: int) -> list[Region]:
    return [Region(i, address, 100, "cuda:0") for i, address in enumerate(addresses)]


def blocks(of: Sequence[Region], id: int = 1) -> list[Allocation]:
    return [Allocation(one.address, one.nbytes, 0, id, True) for one in of]


def soon() -> float:
    return time.monotonic() + 20


def test_the_second_lease_of_the_same_regions_registers_nothing_and_tells_the_same() -> None:
    engine, kept, given = Engine(), RegistrationCache(), regions(100, 300)
    first, told = kept.hold(engine, given, blocks(given), soon())  # type: ignore[arg-type]
    second, again = kept.hold(engine, given, blocks(given), soon())  # type: ignore[arg-type]
    assert engine.calls == 1
    assert again is told
    first.release()
    second.release()
    assert engine.registered == {100, 300}
    kept.forget(given)
    assert engine.registered == set()
    assert len(engine.spans) == 0


def test_a_lease_under_way_keeps_what_it_holds_when_its_seed_closes() -> None:
    engine, kept, given = Engine(), RegistrationCache(), regions(100)
    lease, _ = kept.hold(engine, given, blocks(given), soon())  # type: ignore[arg-type]
    kept.forget(given)
    assert engine.registered == {100}
    lease.release()
    assert engine.registered == set()


def test_a_seed_that_closes_takes_nothing_from_one_that_has_more() -> None:
    engine, kept = Engine(), RegistrationCache()
    target, draft = regions(100, 300), regions(300)
    for given in (target, draft):
        kept.hold(engine, given, blocks(given), soon())[0].release()  # type: ignore[arg-type]
    kept.forget(draft)
    assert engine.registered == {100, 300}
    kept.forget(target)
    assert engine.registered == set()


def test_what_was_mapped_anew_is_registered_anew_and_told_anew() -> None:
    engine, kept, given = Engine(), RegistrationCache(), regions(100)
    lease, told = kept.hold(engine, given, blocks(given), soon())  # type: ignore[arg-type]
    lease.release()
    engine.mappings[100] = 2
    lease, again = kept.hold(engine, given, blocks(given, 2), soon())  # type: ignore[arg-type]
    assert engine.calls == 2
    assert again != told
    lease.release()
    kept.forget()
    assert engine.registered == set()


def test_nothing_stays_for_a_seed_that_closed_while_its_memory_was_registered() -> None:
    kept, given = RegistrationCache(), regions(100)
    engine = Engine(before=lambda: kept.forget(given))
    lease, _ = kept.hold(engine, given, blocks(given), soon())  # type: ignore[arg-type]
    assert engine.registered == {100}
    lease.release()
    assert engine.registered == set()


def test_what_has_been_released_cannot_be_shared() -> None:
    engine, given = Engine(), regions(100)
    held = engine.spans.hold(given, soon())
    held.release()
    with pytest.raises(TransportUnavailable, match="not registered any more"):
        held.shared(soon())
    assert len(engine.spans) == 0
