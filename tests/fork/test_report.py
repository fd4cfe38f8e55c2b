"""What a fork says of itself: every phase, every reservation, in one line."""

import pytest

from tensorfork import ForkReport
from tensorfork.report import PHASES, Stopwatch


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def report(**changes: object) -> ForkReport:
    values: dict[str, object] = {
        "peer": "tcp://10.0.0.7:4180",
        "transport": "zeromq",
        "fabric": "tcp",
        "tensors": 12_345,
        "nbytes": 16_060_000_000,
        "generation": 4,
        "seconds": {"hello": 0.0012, "transfer": 4.0, "verify": 1.5},
        "verified": True,
    }
    return ForkReport(**{**values, **changes})  # type: ignore[arg-type]


def test_it_prints_as_one_line_that_says_everything() -> None:
    assert str(report()) == (
        "forked 12,345 tensors (16.06 GB) from tcp://10.0.0.7:4180 over zeromq/tcp in 5.50 s "
        "(4.01 GB/s; hello 1.2 ms, transfer 4.00 s, verify 1.50 s); verified"
    )
    assert repr(report()) == str(report())


def test_phases_print_in_the_order_in_which_they_come() -> None:
    seconds = dict.fromkeys(reversed(PHASES), 1.0)
    line = str(report(seconds=seconds))
    assert [line.index(f"{name} 1.00 s") for name in PHASES] == sorted(line.index(f"{name} 1.00 s") for name in PHASES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verified": False}, "NOT verified"),
        ({"restarts": 2}, "2 restarts"),
        ({"not_compared": ("identity", "rank")}, "not compared: identity, rank"),
        ({"left_out": ("a", "b"), "left_out_by_seed": ("c",)}, "left out: 2 here, 1 by the seed"),
        ({"left_out_by_seed": ("c",)}, "left out: 0 here, 1 by the seed"),
        ({"nbytes": 0}, "(0 bytes)"),
        ({"nbytes": 999}, "(999 bytes)"),
        ({"nbytes": 1500}, "(1.50 kB)"),
        ({"nbytes": 2_500_000}, "(2.50 MB)"),
    ],
    ids=str,
)
def test_every_reservation_is_in_the_line(changes: dict[str, object], said: str) -> None:
    assert said in str(report(**changes))
    assert "\n" not in str(report(**changes))


def test_what_was_not_said_is_not_in_the_line() -> None:
    line = str(report())
    for word in ("NOT", "restarts", "not compared", "left out"):
        assert word not in line


def test_speed_is_of_the_transfer_alone_and_in_billions_of_bytes_a_second() -> None:
    assert report(nbytes=8_000_000_000).gbps == 2.0
    assert report(seconds={}).gbps == 0.0


def test_the_total_is_the_sum_of_the_phases() -> None:
    assert report().total == pytest.approx(5.5012)


def test_a_stopwatch_adds_up_each_phase_however_often_it_is_entered(clock: Clock) -> None:
    watch = Stopwatch()
    for name, seconds in (("lease", 1.0), ("transfer", 2.0), ("lease", 4.0), ("close", 8.0)):
        watch.enter(name)
        clock.now += seconds
    assert watch.stop() == {"lease": 5.0, "transfer": 2.0, "close": 8.0}


def test_a_stopwatch_counts_nothing_before_its_first_phase_and_after_its_last(clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 1.0
    watch.enter("hello")
    clock.now += 2.0
    watch.stop()
    clock.now += 4.0
    assert watch.stop() == {"hello": 2.0}
