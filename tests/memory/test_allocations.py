"""Which allocations GPU memory lies in, and whether they are still the same; the driver is a fake."""

from collections.abc import Sequence

import pytest
from fake_driver import Driver

from tensorfork import Region, TransportUnavailable
from tensorfork.memory import allocations, cuda
from tensorfork.memory.allocations import MappedMemory, PublishedAllocations


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


MIB = 1 << 20


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A reservation of 100 MiB, in which 4, 20 and 6 MiB are mapped, with a hole of 2 MiB before the last."""
    at = 100 * MIB
    mapped = {
        at: (4 * MIB, 1, False),
        at + 4 * MIB: (20 * MIB, 2, False),
        at + 26 * MIB: (6 * MIB, 3, False),
    }
    fake = Driver(mapped, reserved=(at, at + 100 * MIB))
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    return fake


@pytest.mark.parametrize("offset", [0, 5, 4 * MIB - 1, 4 * MIB, 13 * MIB + 7, 24 * MIB - 1, 26 * MIB, 32 * MIB - 1])
def test_of_reserved_addresses_the_mapping_is_the_allocation(virtual: Driver, offset: int) -> None:
    start = max(one for one in virtual.memory if one <= 100 * MIB + offset)
    found = allocations.allocation_at(100 * MIB + offset)
    assert (found.start, found.nbytes, found.buffer_id) == (start, *virtual.memory[start][:2])


@pytest.mark.parametrize("address", [124 * MIB, 126 * MIB - 1, 132 * MIB, 199 * MIB, 300 * MIB])
def test_reserved_addresses_without_memory_are_no_gpu_memory(virtual: Driver, address: int) -> None:
    with pytest.raises(TransportUnavailable, match=f"{address:#x}"):
        allocations.allocation_at(address)


def test_a_tensor_that_lies_in_two_mappings_stays_one_region(virtual: Driver) -> None:
    wide = at((103 * MIB, 2 * MIB), (101 * MIB, MIB))
    enclosing, places = allocations.enclosing_allocations(wide)
    assert sorted((one.address, one.nbytes) for one in enclosing) == [(100 * MIB, 4 * MIB), (103 * MIB, 2 * MIB)]
    assert [one.offset for one in places] == [0, MIB]


def test_a_later_look_asks_one_question_an_allocation(driver: Driver) -> None:
    mapped = MappedMemory.of(at((0x1000, 8), (0x1800, 8), (0x1FF8, 16), (0x8000, 8)))
    driver.queries.clear()
    assert mapped.moved() == {}
    assert driver.queries == ["id"] * 3


def test_a_look_names_every_region_whose_memory_is_gone_or_mapped_anew(virtual: Driver) -> None:
    MappedMemory.of(at((100 * MIB, MIB), device="cpu"))
    mapped = MappedMemory.of(at((100 * MIB, MIB), (101 * MIB, MIB), (103 * MIB, 2 * MIB), (127 * MIB, MIB)))
    assert mapped.moved() == {}
    del virtual.memory[100 * MIB]
    virtual.memory[126 * MIB] = 6 * MIB, 33, False
    gone, anew = "its memory is not mapped any more", "its memory was unmapped, and mapped anew"
    assert mapped.moved() == {10: gone, 11: gone, 12: gone, 13: anew}
    virtual.memory[100 * MIB] = 4 * MIB, 11, False
    assert mapped.moved() == {10: anew, 11: anew, 12: anew, 13: anew}


def test_memory_that_is_not_mapped_cannot_be_remembered(virtual: Driver) -> None:
    with pytest.raises(TransportUnavailable):
        MappedMemory.of(at((123 * MIB, 2 * MIB)))


def test_a_fork_learns_which_of_its_regions_are_not_mapped(virtual: Driver) -> None:
    given = at((126 * MIB, MIB), (100 * MIB, 24 * MIB), (123 * MIB, 2 * MIB), (150 * MIB, MIB))
    assert set(allocations.why_unmapped(given)) == {12, 13}
    assert "put to sleep" in allocations.why_unmapped(given)[12]
    assert allocations.why_unmapped([*given[:2], *at((150 * MIB, MIB), device="cpu")]) == {}


def test_a_region_on_another_device_than_it_says_is_named(driver: Driver) -> None:
    assert allocations.why_unmapped(at((0x1000, 8), device="cuda:1")) == {
        10: "its memory is on cuda:0 and not on cuda:1"
    }


def test_the_driver_is_not_queried_about_a_model_without_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: pytest.fail("there may be none"))
    host = at((0x1000, 8), device="cpu")
    assert MappedMemory.of(host).moved() == allocations.why_unmapped(host) == {}


def test_memory_that_is_unmapped_while_it_is_measured_still_contains_the_address(
    virtual: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver, "cuPointerGetAttribute", lambda *_: 1)
    found = allocations.allocation_at(110 * MIB + 5)
    assert found.start <= 110 * MIB + 5 < found.end
