"""What is registered with an engine while several users share memory; Mooncake is a fake."""

import itertools
import time
import weakref
from collections.abc import Sequence

import pytest
from attrs import define, field

from tensorfork import Region, TransportUnavailable
from tensorfork.transports.transfer_engine.registrations import MAX_SPANS, Registrations

NEVER, SOON = 0.0, 30.0


def soon() -> float:
    return time.monotonic() + SOON


def at(*spans: tuple[int, int], owner: object = None) -> list[Region]:
    return [Region(10 + i, start, end - start, "cpu", owner) for i, (start, end) in enumerate(spans)]


@define
class Mooncake:
    """Refuses what the real one refuses."""

    registered: dict[int, int] = field(factory=dict)
    mappings: dict[int, int] = field(factory=dict)
    calls: int = 0
    fail_at: int = 0
    registrations: Registrations = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.registrations = Registrations(
            self.register, self.unregister, lambda region: self.mappings.get(region.address, 0)
        )

    def register(self, wanted: Sequence[Region]) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise TransportUnavailable("no")
        for region in wanted:
            end = region.address + region.nbytes
            assert not any(start < end and region.address < start + n for start, n in self.registered.items())
            self.registered[region.address] = region.nbytes

    def unregister(self, wanted: Sequence[Region]) -> None:
        for region in wanted:
            assert self.registered.pop(region.address) == region.nbytes


def test_what_two_users_have_registered_stays_until_both_have_released_it() -> None:
    mooncake = Mooncake()
    one = mooncake.registrations.acquire(at((100, 200), (300, 400)), soon())
    other = mooncake.registrations.acquire(at((300, 400)), soon())
    one.release()
    one.release()
    assert mooncake.registered == {300: 100}
    other.release()
    assert mooncake.registered == {}
    assert len(mooncake.registrations) == 0


def test_of_an_overlapping_region_only_the_missing_parts_are_registered_and_become_boundaries() -> None:
    mooncake = Mooncake()
    one = mooncake.registrations.acquire(at((100, 200), (300, 400)), soon())
    [wide] = at((150, 500))
    other = mooncake.registrations.acquire([wide], soon())
    assert mooncake.registered == {100: 100, 200: 100, 300: 100, 400: 100}
    assert other.boundaries(wide) == [50, 150, 250]
    one.release()
    assert mooncake.registered == {100: 100, 200: 100, 300: 100, 400: 100}
    other.release()
    assert mooncake.registered == {}


def test_any_order_of_acquiring_and_releasing_leaves_nothing_registered() -> None:
    given = [at((100, 300)), at((200, 400)), at((100, 150), (350, 500)), at((50, 600))]
    for order in itertools.permutations(range(4)):
        mooncake = Mooncake()
        acquired = [mooncake.registrations.acquire(given[i], soon()) for i in order]
        assert sum(mooncake.registered.values()) == 550
        for i in order:
            acquired[i].release()
        assert mooncake.registered == {}


def test_a_registration_that_fails_leaves_nothing_behind() -> None:
    mooncake = Mooncake(fail_at=3)
    many = at(*((i * 10, i * 10 + 5) for i in range(1, 1001)))
    with pytest.raises(TransportUnavailable):
        mooncake.registrations.acquire(many, soon())
    assert mooncake.registered == {}
    mooncake.registrations.acquire(many, soon()).release()
    assert mooncake.registered == {}


def test_a_registration_that_misses_its_deadline_leaves_nothing_behind() -> None:
    mooncake = Mooncake()
    with pytest.raises(TransportUnavailable, match="deadline"):
        mooncake.registrations.acquire(at((100, 200)), NEVER)
    assert mooncake.registered == {}


def test_more_registrations_than_mooncake_serves_are_refused() -> None:
    mooncake = Mooncake()
    with pytest.raises(TransportUnavailable, match="12,000"):
        mooncake.registrations.acquire(at(*((i * 10, i * 10 + 5) for i in range(MAX_SPANS + 1))), soon())
    assert mooncake.registered == {}


def test_memory_mapped_anew_while_it_is_registered_is_noticed() -> None:
    mooncake = Mooncake()
    one = mooncake.registrations.acquire(at((100, 200)), soon())
    assert not one.is_stale()
    mooncake.mappings[100] = 7
    assert one.is_stale()
    with pytest.raises(TransportUnavailable, match="mapped anew"):
        mooncake.registrations.acquire(at((100, 200)), soon())
    one.release()
    mooncake.registrations.acquire(at((100, 200)), soon()).release()


def test_a_fingerprint_changes_with_the_registration_or_with_the_mapping() -> None:
    mooncake = Mooncake()
    one = mooncake.registrations.acquire(at((100, 200)), soon())
    shared = mooncake.registrations.acquire(at((100, 200)), soon())
    assert one.fingerprint(by_mapping=False) == shared.fingerprint(by_mapping=False)
    before = one.fingerprint(by_mapping=False), one.fingerprint(by_mapping=True)
    one.release()
    shared.release()
    again = mooncake.registrations.acquire(at((100, 200)), soon())
    assert again.fingerprint(by_mapping=False) != before[0]
    assert again.fingerprint(by_mapping=True) == before[1]


class Owner:
    """Owns memory."""


def test_owners_are_kept_alive_by_their_own_registration_and_no_longer() -> None:
    """A seed that publishes other tensors in the same allocation must not hold those that it published before."""
    mooncake, owner = Mooncake(), Owner()
    kept = weakref.ref(owner)
    replaced = mooncake.registrations.acquire(at((100, 200), owner=owner), soon())
    shared = replaced.share(soon())
    now = mooncake.registrations.acquire(at((150, 160), owner="other"), soon())
    del owner
    replaced.release()
    assert kept() is not None
    shared.release()
    assert kept() is None
    assert mooncake.registered
    now.release()
    assert mooncake.registered == {}


def test_memory_at_the_address_of_replaced_memory_is_registered_once_the_old_lease_has_ended() -> None:
    mooncake = Mooncake()
    old = mooncake.registrations.acquire(at((100, 200), (300, 400)), soon())
    mooncake.mappings[100] = 7
    with pytest.raises(TransportUnavailable, match="mapped anew"):
        mooncake.registrations.acquire(at((100, 180)), soon())
    old.release()
    new = mooncake.registrations.acquire(at((100, 180)), soon())
    assert mooncake.registered == {100: 80}
    new.release()
