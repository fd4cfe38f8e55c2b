"""What the TransferEngine transport decides and keeps track of, without an engine."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from attrs import define, field

import tensorfork
from tensorfork import Region, TransferFailed, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.transports import registry
from tensorfork.transports.rate_limit import RateLimiter
from tensorfork.transports.transfer_engine import TransferEngine, enclosing, fabrics
from tensorfork.transports.transfer_engine.engine import Outcome
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion
from tensorfork.transports.transfer_engine.registrations import MOST, Registrations
from tensorfork.transports.transfer_engine.undrained import InFlightRead, UndrainedReads

NEVER, SOON = 0.0, 30.0


def soon() -> float:
    return time.monotonic() + SOON


# The choice of a fabric.

GPU = {"devices": ["cuda:0"], "cuda": True}
CPU = {"devices": ["cpu"], "cuda": False}


def said(**changes: Any) -> dict[str, Any]:
    return {
        "wheel": "mooncake 1",
        "cuda": True,
        "fabrics": ["nvlink", "rdma", "tcp"],
        "host": "here",
        "process": b"one",
        "devices": ["cuda:0"],
        "nics": ["mlx5_0"],
        "closed": None,
    } | changes


@pytest.mark.parametrize(
    ("fork", "seed", "fabric"),
    [
        ({}, {"process": b"other"}, "nvlink"),
        ({}, {"host": "there"}, "rdma"),
        ({}, {"host": None}, "rdma"),
        ({}, {"process": b"other", "closed": "expandable"}, "rdma"),
        ({}, {}, "rdma"),
        ({}, {"host": "there", "nics": []}, "tcp"),
        (CPU, CPU, "rdma"),
        ({"nics": []}, {"devices": ["cpu", "cuda:0"]}, "tcp"),
        ({"fabrics": ["tcp", "nvlink"]}, {}, "tcp"),
        ({"fabrics": ["rdma"]}, {}, "rdma"),
    ],
)
def test_the_first_fabric_that_both_can_use_is_chosen(fork: Any, seed: Any, fabric: str) -> None:
    assert fabrics.choose(said(**fork), said(**seed)) == fabric


@pytest.mark.parametrize(
    ("fork", "seed", "why_not"),
    [
        ({"fabrics": ["rdma"], "nics": []}, {}, "rdma: the fork has no RDMA NIC"),
        ({"fabrics": ["rdma"]}, {"nics": []}, "rdma: the seed has no RDMA NIC"),
        ({"fabrics": ["rdma"]}, {"cuda": False}, "rdma: the seed's tensors are on cuda:0"),
        ({"fabrics": ["nvlink"]}, {"host": "there"}, "nvlink: the two are not on one host"),
        ({"fabrics": ["nvlink"], "host": None}, {"host": None}, "nvlink: the two are not on one host"),
        ({"fabrics": ["nvlink"]}, {"devices": ["cpu", "cuda:0"]}, "some of the seed's is on the CPU; cuda_ipc takes"),
        ({"fabrics": ["nvlink"]}, {"process": b"other", "closed": "it is expandable"}, "nvlink: it is expandable"),
        ({"fabrics": ["nvlink"]}, {}, "nvlink: both are one process"),
        ({"fabrics": ["nvlink"], "cuda": False}, {}, "nvlink: the fork's mooncake 1 was built without CUDA"),
        ({"fabrics": ["tcp"]}, {"fabrics": ["rdma"]}, r"transports=\['transfer_engine:tcp'\]"),
        ({"fabrics": ["nvlink", "rdma"], "nics": []}, {"host": "there"}, "nvlink: .*; rdma: "),
        ({}, {"fabrics": []}, "the seed does not offer it"),
    ],
)
def test_the_reasons_against_each_fabric_are_said(fork: Any, seed: Any, why_not: str) -> None:
    with pytest.raises(TransportUnavailable, match=why_not):
        fabrics.choose(said(**fork), said(**seed))
    assert TransferEngine().why_not(said(**fork), said(**seed)) is not None


def test_tcp_is_offered_only_by_name() -> None:
    by_default = TransferEngine()
    assert by_default.why_not(said(fabrics=["tcp"]), said(fabrics=list(_fabrics(by_default)))) is not None
    named = registry.load("transfer_engine:tcp")
    assert named.why_not(said(fabrics=["tcp"]), said(fabrics=list(_fabrics(named)))) is None


def _fabrics(transport: tensorfork.Transport) -> Sequence[str]:
    assert isinstance(transport, TransferEngine)
    return transport._fabrics


def test_the_host_is_the_same_for_two_processes_on_one_network() -> None:
    assert process.host_and_network_id() == process.host_and_network_id()
    assert process.host_and_network_id() is not None


@pytest.mark.parametrize("name", ["transfer_engine:carrier", "zeromq:tcp", "cuda_ipc:nvlink"])
def test_a_fabric_that_a_transport_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(TransportUnavailable, match=name.partition(":")[2]):
        registry.load(name)


@pytest.mark.parametrize("wrong", [{"fabric": "carrier"}, {"rate_limit": 0}, {"piece": 1000}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fabric|rate_limit|piece"):
        TransferEngine(**wrong)
    with pytest.raises(TypeError, match="nics"):
        TransferEngine(nics="mlx5_0")


# Regions.


def at(*spans: tuple[int, int], owner: object = None) -> list[Region]:
    return [Region(10 + i, start, end - start, "cpu", owner) for i, (start, end) in enumerate(spans)]


def test_overlapping_regions_are_covered_once_and_others_stay_apart() -> None:
    given = at((1000, 1100), (1200, 1300), (1050, 1150), (1100, 1120), (1300, 1400))
    covering, places = enclosing.enclosing_regions(given)
    assert [(one.address, one.nbytes) for one in covering] == [(1000, 150), (1200, 100), (1300, 100)]
    for region, place in zip(given, places, strict=True):
        assert covering[place.region].address + place.offset == region.address


def test_covered_regions_keep_all_their_owners() -> None:
    one, other = object(), object()
    covering, _ = enclosing.enclosing_regions([*at((1000, 1100), owner=one), Region(99, 1050, 100, "cpu", other)])
    assert covering[0].owner == (one, other)


def test_of_many_regions_the_closest_neighbours_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosing, "FEW", 4)
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 10_000), (10_000, 20_000)])
    given = at((100, 200), (210, 300), (1300, 1400), (1402, 1500), (9000, 10_000), (10_000, 10_100))
    covering, places = enclosing.enclosing_regions(given)
    assert [(one.address, one.address + one.nbytes) for one in covering] == [
        (100, 300),
        (1300, 1500),
        (9000, 10_000),
        (10_000, 10_100),
    ]
    for region, place in zip(given, places, strict=True):
        assert covering[place.region].address + place.offset == region.address


def test_regions_with_unmapped_memory_between_them_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosing, "FEW", 1)
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 250), (300, 1000)])
    assert len(enclosing.enclosing_regions(at((100, 200), (310, 400)))[0]) == 2
    monkeypatch.setattr(enclosing, "_readable", lambda: [(0, 1000)])
    assert len(enclosing.enclosing_regions(at((100, 200), (310, 400)))[0]) == 1


# Registrations.


@define
class Library:
    """Refuses what Mooncake refuses."""

    registered: dict[int, int] = field(factory=dict)
    mappings: dict[int, int] = field(factory=dict)
    calls: int = 0
    fail_at: int = 0
    spans: Registrations = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.spans = Registrations(self.register, self.unregister, lambda region: self.mappings.get(region.address, 0))

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


def test_what_is_registered_twice_stays_until_both_have_released_it() -> None:
    mooncake = Library()
    one = mooncake.spans.hold(at((100, 200), (300, 400)), soon())
    other = mooncake.spans.hold(at((300, 400)), soon())
    one.release()
    one.release()
    assert mooncake.registered == {300: 100}
    other.release()
    assert mooncake.registered == {}
    assert len(mooncake.spans) == 0


def test_of_an_overlapping_region_only_what_is_missing_is_registered_and_no_read_may_cross() -> None:
    mooncake = Library()
    one = mooncake.spans.hold(at((100, 200), (300, 400)), soon())
    [wide] = at((150, 500))
    other = mooncake.spans.hold([wide], soon())
    assert mooncake.registered == {100: 100, 200: 100, 300: 100, 400: 100}
    assert other.cuts(wide) == [50, 150, 250]
    one.release()
    assert mooncake.registered == {100: 100, 200: 100, 300: 100, 400: 100}
    other.release()
    assert mooncake.registered == {}


def test_any_order_of_holding_and_releasing_leaves_nothing_registered() -> None:
    given = [at((100, 300)), at((200, 400)), at((100, 150), (350, 500)), at((50, 600))]
    for order in itertools.permutations(range(4)):
        mooncake = Library()
        held = [mooncake.spans.hold(given[i], soon()) for i in order]
        assert sum(mooncake.registered.values()) == 550
        for i in order:
            held[i].release()
        assert mooncake.registered == {}


def test_a_registration_that_fails_leaves_nothing_behind() -> None:
    mooncake = Library(fail_at=3)
    many = at(*((i * 10, i * 10 + 5) for i in range(1, 1001)))
    with pytest.raises(TransportUnavailable):
        mooncake.spans.hold(many, soon())
    assert mooncake.registered == {}
    mooncake.spans.hold(many, soon()).release()
    assert mooncake.registered == {}


def test_a_registration_that_is_not_over_by_the_deadline_leaves_nothing_behind() -> None:
    mooncake = Library()
    with pytest.raises(TransportUnavailable, match="deadline"):
        mooncake.spans.hold(at((100, 200)), NEVER)
    assert mooncake.registered == {}


def test_more_registrations_than_mooncake_serves_are_refused() -> None:
    mooncake = Library()
    with pytest.raises(TransportUnavailable, match="12,000"):
        mooncake.spans.hold(at(*((i * 10, i * 10 + 5) for i in range(MOST + 1))), soon())
    assert mooncake.registered == {}


def test_memory_mapped_anew_while_it_is_registered_is_noticed() -> None:
    mooncake = Library()
    one = mooncake.spans.hold(at((100, 200)), soon())
    assert not one.is_stale()
    mooncake.mappings[100] = 7
    assert one.is_stale()
    with pytest.raises(TransportUnavailable, match="mapped anew"):
        mooncake.spans.hold(at((100, 200)), soon())
    one.release()
    mooncake.spans.hold(at((100, 200)), soon()).release()


def test_a_serial_changes_with_the_registration_or_with_the_mapping() -> None:
    mooncake = Library()
    one = mooncake.spans.hold(at((100, 200)), soon())
    shared = mooncake.spans.hold(at((100, 200)), soon())
    assert one.serial(by_mapping=False) == shared.serial(by_mapping=False)
    before = one.serial(by_mapping=False), one.serial(by_mapping=True)
    one.release()
    shared.release()
    again = mooncake.spans.hold(at((100, 200)), soon())
    assert again.serial(by_mapping=False) != before[0]
    assert again.serial(by_mapping=True) == before[1]


def test_owners_are_kept_for_as_long_as_their_memory_is_registered() -> None:
    mooncake = Library()
    one = mooncake.spans.hold(at((100, 200), owner="one"), soon())
    other = mooncake.spans.hold(at((150, 160), owner="other"), soon())
    one.release()
    assert [span.owners for span in mooncake.spans._spans] == [["one", "other"]]
    other.release()


# Offers, pace, quarantine.


def test_an_offer_comes_back_as_it_was_packed() -> None:
    offer = Offer("rdma", b"n" * 8, b"s" * 8, 15000, {7: OfferedRegion(1 << 40, (1, 2**33)), 1: OfferedRegion(5, ())})
    assert Offer.unpack(offer.pack()) == offer


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_an_offer_that_was_cut_short_is_refused(cut: int) -> None:
    packed = Offer("tcp", b"n" * 8, b"s" * 8, 15000, {7: OfferedRegion(1 << 40, (1, 2))}).pack()
    with pytest.raises(TransportUnavailable):
        Offer.unpack(packed[: min(cut, len(packed) - 1)])


def test_a_fabric_nobody_knows_is_refused() -> None:
    with pytest.raises(TransportUnavailable):
        Offer.unpack(b"tfTE1\xff" + Offer("tcp", b"n" * 8, b"s" * 8, 1, {}).pack()[6:])


def test_a_rate_is_kept_on_average_and_idle_time_is_not_made_up_for() -> None:
    pace = RateLimiter(1000.0)
    now, sent = 50.0, 0
    while now < 60.0:
        if wait := pace.wait(now):
            now += wait
            continue
        pace.spend(100, now)
        sent += 100
    assert sent == 10_000
    assert pace.wait(now + 100) == 0
    pace.spend(100, now + 100)
    assert pace.wait(now + 100) == pytest.approx(0.1)


def test_without_a_rate_nothing_waits_and_with_one_reads_are_short() -> None:
    unbound = RateLimiter(None)
    unbound.spend(1 << 40, 1.0)
    assert unbound.wait(1.0) == 0
    assert unbound.piece(1 << 30) == 1 << 30
    assert RateLimiter(10e6).piece(1 << 30) == 1_000_000
    assert RateLimiter(1.0).piece(1 << 30) == 64 << 10


class Reads:
    """Reads that are over when they are told to be; Mooncake's rule is that nobody asks again."""

    def __init__(self) -> None:
        self.over: dict[int, Outcome] = {}
        self.told: set[int] = set()

    def outcome(self, number: int) -> Outcome:
        assert number not in self.told
        if number in self.over:
            self.told.add(number)
        return self.over.get(number, Outcome.RUNNING)


@pytest.fixture
def quarantine() -> Iterator[UndrainedReads]:
    made = UndrainedReads()
    yield made
    assert made.stretches() == []


def test_memory_is_kept_until_every_read_into_it_is_over(quarantine: UndrainedReads) -> None:
    reads, drained = Reads(), threading.Event()
    quarantine.take([InFlightRead(0, 100, 10, 1), InFlightRead(1, 200, 10, 2)], reads.outcome, drained.set, object())
    reads.over[2] = Outcome.FAILED
    quarantine.wait([(200, 10)], soon(), lambda: False)
    assert quarantine.stretches() == [(100, 10)]
    assert not drained.is_set()
    with pytest.raises(TransferFailed, match="may still be writing"):
        quarantine.wait([(50, 51)], NEVER, lambda: False)
    with pytest.raises(TransferFailed, match="cancelled"):
        quarantine.wait([(109, 1)], soon(), lambda: True)
    quarantine.wait([(50, 50), (110, 10)], NEVER, lambda: False)
    reads.over[1] = Outcome.DONE
    quarantine.wait([(100, 10)], soon(), lambda: False)
    assert drained.wait(SOON)


def test_a_read_whose_asking_was_interrupted_is_never_asked_about_again() -> None:
    flight = InFlightRead(0, 100, 10, 1)

    def interrupted(number: int) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flight.ask(interrupted)
    assert flight.ask(interrupted) is Outcome.RUNNING
