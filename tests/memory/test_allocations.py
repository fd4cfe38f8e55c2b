"""Which allocations GPU memory lies in, and whether they are still the same; the driver is a fake."""

from collections.abc import Sequence

import pytest
from fake_driver import Driver

from tensorfork import Region, TransportUnavailable
from tensorfork.memory import allocations, cuda
from tensorfork.memory.allocations import PublishedAllocations


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver({0x1000: (0x1000, 7, True), 0x2000: (0x1000, 8, True), 0x8000: (0x800, 9, False)})
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    return fake


def at(*ranges: tuple[int, int], device: str = "cuda:0") -> list[Region]:
    return [Region(10 + i, start, nbytes, device) for i, (start, nbytes) in enumerate(ranges)]


def starts(found: Sequence[allocations.Allocation]) -> list[int]:
    return [one.start for one in found]


def test_an_allocation_is_queried_once_for_all_regions_in_it(driver: Driver) -> None:
    assert starts(allocations.allocations_of(at((0x1800, 8), (0x1000, 8), (0x2FF8, 8)))) == [0x1000, 0x2000]
    assert driver.queries == ["allocation", "allocation"]


def test_the_driver_is_not_queried_for_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: pytest.fail("there may be none"))
    host = at((0x1000, 8), device="cpu")
    published = PublishedAllocations()
    assert allocations.allocations_of(host) == published.add(host) == published.check(host) == []
    assert allocations.enclosing_allocations(host)[0] == [Region(0, 0x1000, 8, "cpu")]


def test_regions_are_replaced_by_their_allocations_unless_they_reach_beyond_one(driver: Driver) -> None:
    given = at((0x1800, 8), (0x1FF8, 16), (0x1000, 8))
    enclosing, places = allocations.enclosing_allocations(given)
    for region, place in zip(given, places, strict=True):
        allocation = next(one for one in enclosing if one.id == place.region)
        assert allocation.address + place.offset == region.address
        assert place.offset + region.nbytes <= allocation.nbytes
    assert sorted((one.address, one.nbytes) for one in enclosing) == [(0x1000, 0x1000), (0x1FF8, 16)]


def test_every_allocation_of_a_region_counts(driver: Driver) -> None:
    driver.memory[0x3000] = 0x1000, 9, False
    found = allocations.allocations_of(at((0x1000, 0x3000), (0x2800, 0x800), (0x8000, 8)))
    assert starts(found) == [0x1000, 0x2000, 0x3000, 0x8000]
    assert allocations.why_not_exportable(found[:3]) is not None


def test_the_reason_why_memory_cannot_be_exported_has_the_remedy(driver: Driver) -> None:
    assert allocations.why_not_exportable(allocations.allocations_of(at((0x1000, 8)))) is None
    assert "expandable_segments" in str(
        allocations.why_not_exportable(allocations.allocations_of(at((0x1000, 8), (0x8000, 8))))
    )


def test_a_lease_queries_only_the_id_of_each_allocation(driver: Driver) -> None:
    published = PublishedAllocations()
    known = published.add(at((0x1800, 8), (0x2000, 8)))
    enclosing, _ = allocations.enclosing_allocations(at((0x1800, 8), (0x2000, 8)))
    driver.queries.clear()
    assert published.check(enclosing) == known
    assert driver.queries == ["id", "id"]


@pytest.mark.parametrize("now", [(0x1000, 70, True), None])
def test_memory_that_was_freed_and_perhaps_mapped_anew_is_noticed(
    driver: Driver, now: tuple[int, int, bool] | None
) -> None:
    published = PublishedAllocations()
    published.add(at((0x1000, 8), (0x2000, 8)))
    enclosing, _ = allocations.enclosing_allocations(at((0x1000, 8), (0x2000, 8)))
    del driver.memory[0x1000]
    if now is not None:
        driver.memory[0x1000] = now
    with pytest.raises(TransportUnavailable, match="0x1000"):
        published.check(enclosing)


@pytest.mark.parametrize("changed", [0x1000, 0x2000])
def test_so_is_memory_under_a_region_that_reaches_beyond_its_allocation(driver: Driver, changed: int) -> None:
    published = PublishedAllocations()
    wide = at((0x1FF8, 16))
    published.add(wide)
    assert starts(published.check(wide)) == [0x1000, 0x2000]
    driver.memory[0x1000] = 0x1000, 70, True
    with pytest.raises(TransportUnavailable, match="0x1ff8"):
        published.check(wide)


def test_memory_that_is_published_again_counts_as_it_is_now(driver: Driver) -> None:
    published = PublishedAllocations()
    published.add(at((0x1000, 8)))
    driver.memory[0x1000] = 0x1000, 70, True
    published.add(at((0x1000, 8)))
    enclosing, _ = allocations.enclosing_allocations(at((0x1000, 8)))
    assert [one.buffer_id for one in published.check(enclosing)] == [70]
