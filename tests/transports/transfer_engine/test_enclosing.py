"""Which regions are registered in place of many small ones."""

import pytest

from tensorfork import Region
from tensorfork.transports.transfer_engine import enclosing


def at(*spans: tuple[int, int], owner: object = None) -> list[Region]:
    return [Region(10 + i, start, end - start, "cpu", owner) for i, (start, end) in enumerate(spans)]


def test_overlapping_regions_are_enclosed_together_and_others_stay_separate() -> None:
    given = at((1000, 1100), (1200, 1300), (1050, 1150), (1100, 1120), (1300, 1400))
    outer, places = enclosing.enclosing_regions(given)
    assert [(one.address, one.nbytes) for one in outer] == [(1000, 150), (1200, 100), (1300, 100)]
    for region, place in zip(given, places, strict=True):
        assert outer[place.region].address + place.offset == region.address


def test_an_enclosing_region_keeps_the_owners_of_all_that_it_contains() -> None:
    one, other = object(), object()
    outer, _ = enclosing.enclosing_regions([*at((1000, 1100), owner=one), Region(99, 1050, 100, "cpu", other)])
    assert outer[0].owner == (one, other)


def test_of_many_regions_the_closest_neighbours_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosing, "MAX_SEPARATE", 4)
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 10_000), (10_000, 20_000)])
    given = at((100, 200), (210, 300), (1300, 1400), (1402, 1500), (9000, 10_000), (10_000, 10_100))
    outer, places = enclosing.enclosing_regions(given)
    assert [(one.address, one.address + one.nbytes) for one in outer] == [
        (100, 300),
        (1300, 1500),
        (9000, 10_000),
        (10_000, 10_100),
    ]
    for region, place in zip(given, places, strict=True):
        assert outer[place.region].address + place.offset == region.address


def test_regions_with_unmapped_memory_between_them_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosing, "MAX_SEPARATE", 1)
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 250), (300, 1000)])
    assert len(enclosing.enclosing_regions(at((100, 200), (310, 400)))[0]) == 2
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 1000)])
    assert len(enclosing.enclosing_regions(at((100, 200), (310, 400)))[0]) == 1
