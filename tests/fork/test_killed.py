"""Processes that die or stop in the middle of a fork: the other one notices in time, and tells the truth."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from processes import Child, serve

import tensorfork

pytestmark = pytest.mark.slow

SECONDS = 30.0
SHORT = 2.0
"""The deadline of a fork in the middle of which its seed stops; by then the first bytes must have come."""
COUNT, EACH = 24, 1 << 20
"""Tensors, and elements of each: more than all that is under way at a time."""


def model() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((EACH,), float(i + 1)) for i in range(COUNT)}


def blank(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {name: torch.full((EACH,), -1.0, device=device) for name in names()}


def names() -> list[str]:
    return [f"layer.{i}" for i in range(COUNT)]


def whole(found: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are as the seed has them."""
    return {name for i, name in enumerate(names()) if bool((found[name] == float(i + 1)).all())}


class Once:
    """A progress callback that does something when the first bytes have arrived, and remembers what it saw."""

    def __init__(
        self, do: Callable[[], None], when: Callable[[int, int], bool] = lambda moved, total: moved > 0
    ) -> None:
        self._do, self._when, self.called = do, when, False
        self.moved = 0

    def __call__(self, moved: int, total: int) -> None:
        self.moved = moved
        if not self.called and self._when(moved, total):
            self.called = True
            self._do()


@pytest.fixture
def child() -> Iterator[Child]:
    with Child(serve, model) as child:
        yield child


def fails(into: dict[str, torch.Tensor], address: str, progress: Any, kind: type[Exception], timeout: float) -> Any:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        tensorfork.fork_into(into, address, device="cpu", progress=progress, timeout=timeout)
    assert time.monotonic() - started < 5 * (timeout + 1)
    assert progress.called
    assert address in str(caught.value)
    return caught.value


def is_true(error: tensorfork.TransferFailed, into: dict[str, torch.Tensor]) -> None:
    """What it says to be complete is, and is neither nothing nor everything."""
    assert error.undrained == ()
    assert set(error.complete) <= whole(into)
    assert 0 < len(error.complete) < COUNT
    assert len(set(error.complete)) == len(error.complete)


# The seed.


def test_a_seed_killed_under_way_fails_the_fork_at_once_and_what_is_complete_is_said(child: Child) -> None:
    address, into = child.recv(), blank()
    started = time.monotonic()
    error = fails(into, address, Once(child.kill), tensorfork.TransferFailed, SECONDS)
    assert time.monotonic() - started < SECONDS / 2  # nobody waits for the deadline
    is_true(error, into)


def test_a_seed_stopped_under_way_fails_the_fork_by_the_deadline_and_nothing_comes_late(child: Child) -> None:
    address, into = child.recv(), blank()
    error = fails(into, address, Once(child.stop), tensorfork.TransferFailed, SHORT)
    is_true(error, into)
    for tensor in into.values():
        tensor.fill_(-2.0)
    child.resume()
    assert whole(tensorfork.fork(address, timeout=SECONDS)) == set(names())  # what was under way has had its time
    assert all(bool((tensor == -2.0).all()) for tensor in into.values())
    assert child.request("errors") == []


def test_a_meta_model_stays_meta_when_its_seed_is_killed(child: Child) -> None:
    address, into = child.recv(), blank("meta")
    before = {name: id(tensor) for name, tensor in into.items()}
    error = fails(into, address, Once(child.kill), tensorfork.TransferFailed, SECONDS)
    assert 0 < len(error.complete) < COUNT
    assert all(tensor.is_meta for tensor in into.values())
    assert {name: id(tensor) for name, tensor in into.items()} == before


def test_a_seed_killed_before_the_first_byte_fails_the_fork(child: Child) -> None:
    address, into = child.recv(), blank()
    progress = Once(child.kill, lambda moved, total: moved == 0)
    error = fails(into, address, progress, tensorfork.TransferFailed, SECONDS)
    assert set(error.complete) <= whole(into)


def test_a_seed_killed_after_the_last_byte_fails_the_fork_though_every_byte_has_come(child: Child) -> None:
    """Nobody can say any more whether they are of one moment."""
    address, into = child.recv(), blank("meta")
    progress = Once(child.kill, lambda moved, total: moved == total)
    error = fails(into, address, progress, tensorfork.PeerUnreachable, SECONDS)
    assert "step check" in str(error)
    assert all(tensor.is_meta for tensor in into.values())


def test_a_seed_stopped_after_the_last_byte_fails_the_fork_by_the_deadline(child: Child) -> None:
    address, into = child.recv(), blank("meta")
    progress = Once(child.stop, lambda moved, total: moved == total)
    error = fails(into, address, progress, tensorfork.PeerUnreachable, SHORT)
    assert "step check" in str(error)
    assert all(tensor.is_meta for tensor in into.values())


def test_a_seed_that_is_stopped_already_is_unreachable_by_the_deadline(child: Child) -> None:
    address = child.recv()
    child.stop()
    started = time.monotonic()
    with pytest.raises(tensorfork.PeerUnreachable, match="step hello"):
        tensorfork.fork(address, timeout=1.0)
    assert time.monotonic() - started < 10


def test_a_seed_that_was_killed_is_unreachable(child: Child) -> None:
    address = child.recv()
    child.kill()
    with pytest.raises(tensorfork.PeerUnreachable, match="refused"):
        tensorfork.fork(address, timeout=1.0)


def test_a_seed_that_closes_under_way_fails_the_fork_at_once(child: Child) -> None:
    address, into = child.recv(), blank()
    started = time.monotonic()
    error = fails(into, address, Once(lambda: child.request("close")), tensorfork.TransferFailed, SECONDS)
    assert time.monotonic() - started < SECONDS / 2
    is_true(error, into)


# The fork.


def fork_and_hang(pipe: Any, address: str, timeout: float) -> None:
    """Fork, say so when the first bytes have arrived, and go no further."""
    import threading

    def hang(moved: int, total: int) -> None:
        if moved:
            pipe.send("under way")
            threading.Event().wait()

    tensorfork.fork(address, progress=hang, timeout=timeout)


def settled(child: Child) -> tensorfork.SeedStats:
    end = time.monotonic() + SECONDS
    while (stats := child.request("stats")).running:
        assert time.monotonic() < end, f"leases are still running: {stats}"
        time.sleep(0.02)
    return stats


def test_a_fork_killed_under_way_costs_its_seed_a_lease_for_a_moment(child: Child) -> None:
    address = child.recv()
    for _ in range(2):
        with Child(fork_and_hang, address, 3600.0) as fork:
            assert fork.recv() == "under way"
            assert child.request("stats").running == 1
            fork.kill()
        assert whole(tensorfork.fork(address, timeout=SECONDS)) == set(names())
        assert settled(child).expired == 0
    assert child.request("errors") == []


def test_a_fork_stopped_under_way_holds_up_nobody_and_loses_its_lease_at_its_deadline(child: Child) -> None:
    address = child.recv()
    with Child(fork_and_hang, address, SHORT) as fork:
        assert fork.recv() == "under way"
        fork.stop()
        assert whole(tensorfork.fork(address, timeout=SECONDS)) == set(names())
        assert settled(child).expired == 1
    assert whole(tensorfork.fork(address, timeout=SECONDS)) == set(names())
    assert child.request("errors") == []
