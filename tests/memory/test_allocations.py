"""Which allocations memory of a GPU lies in, and whether they are what they were; the driver is a fake."""

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


def at(*stretches: tuple[int, int], device: str = "cuda:0") -> list[Region]:
    return [Region(10 + i, start, nbytes, device) for i, (start, nbytes) in enumerate(stretches)]


def starts(found: Sequence[allocations.Allocation]) -> list[int]:
    return [one.start for one in found]


def test_a_block_is_looked_up_once_for_all_that_lies_in_it(driver: Driver) -> None:
    assert starts(allocations.allocations_of(at((0x1800, 8), (0x1000, 8), (0x2FF8, 8)))) == [0x1000, 0x2000]
    assert driver.asked == ["block", "block"]


def test_no_driver_is_asked_for_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: pytest.fail("there may be none"))
    host = at((0x1000, 8), device="cpu")
    published = PublishedAllocations()
    assert allocations.allocations_of(host) == published.add(host) == published.check(host) == []
    assert allocations.enclosing_allocations(host)[0] == [Region(0, 0x1000, 8, "cpu")]


def test_regions_are_covered_by_their_blocks_and_what_reaches_beyond_stays_as_it_is(driver: Driver) -> None:
    given = at((0x1800, 8), (0x1FF8, 16), (0x1000, 8))
    covering, places = allocations.enclosing_allocations(given)
    for region, place in zip(given, places, strict=True):
        cover = next(one for one in covering if one.id == place.region)
        assert cover.address + place.offset == region.address
        assert place.offset + region.nbytes <= cover.nbytes
    assert sorted((one.address, one.nbytes) for one in covering) == [(0x1000, 0x1000), (0x1FF8, 16)]


def test_every_block_of_a_region_counts(driver: Driver) -> None:
    driver.memory[0x3000] = 0x1000, 9, False
    found = allocations.allocations_of(at((0x1000, 0x3000), (0x2800, 0x800), (0x8000, 8)))
    assert starts(found) == [0x1000, 0x2000, 0x3000, 0x8000]
    assert allocations.why_not_exportable(found[:3]) is not None


def test_what_cannot_be_exported_is_said_with_the_remedy(driver: Driver) -> None:
    assert allocations.why_not_exportable(allocations.allocations_of(at((0x1000, 8)))) is None
    assert "expandable_segments" in str(
        allocations.why_not_exportable(allocations.allocations_of(at((0x1000, 8), (0x8000, 8))))
    )


def test_a_lease_asks_one_short_question_a_block(driver: Driver) -> None:
    published = PublishedAllocations()
    known = published.add(at((0x1800, 8), (0x2000, 8)))
    covering, _ = allocations.enclosing_allocations(at((0x1800, 8), (0x2000, 8)))
    driver.asked.clear()
    assert published.check(covering) == known
    assert driver.asked == ["id", "id"]


@pytest.mark.parametrize("now", [(0x1000, 70, True), None])
def test_memory_that_was_freed_and_perhaps_mapped_anew_is_noticed(
    driver: Driver, now: tuple[int, int, bool] | None
) -> None:
    published = PublishedAllocations()
    published.add(at((0x1000, 8), (0x2000, 8)))
    covering, _ = allocations.enclosing_allocations(at((0x1000, 8), (0x2000, 8)))
    del driver.memory[0x1000]
    if now is not None:
        driver.memory[0x1000] = now
    with pytest.raises(TransportUnavailable, match="0x1000"):
        published.check(covering)


@pytest.mark.parametrize("changed", [0x1000, 0x2000])
def test_so_is_that_under_a_region_that_reaches_beyond_its_block(driver: Driver, changed: int) -> None:
    published = PublishedAllocations()
    wide = at((0x1FF8, 16))
    published.add(wide)
    assert starts(published.check(wide)) == [0x1000, 0x2000]
    driver.memory[0x1000] = 0x1000, 70, True
    with pytest.raises(TransportUnavailable, match="0x1ff8"):
        published.check(wide)


def test_what_is_published_again_is_as_it_is_now(driver: Driver) -> None:
    published = PublishedAllocations()
    published.add(at((0x1000, 8)))
    driver.memory[0x1000] = 0x1000, 70, True
    published.add(at((0x1000, 8)))
    covering, _ = allocations.enclosing_allocations(at((0x1000, 8)))
    assert [one.buffer_id for one in published.check(covering)] == [70]
