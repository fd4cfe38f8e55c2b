"""A seed in a process of its own, whose model is freed, shared, moved: the process lives, and the fork hears of it."""

from collections.abc import Iterator
from typing import Any

import pytest
from moving_models import MOVES, Attention, serve_moving, values
from processes import Child
from seed_leases import SECONDS, under_way

import tensorfork
from tensorfork.transports import registry
from tensorfork.transports.base import Transport

pytestmark = pytest.mark.slow

TRANSPORTS = ["zeromq", "gloo"]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def seed() -> Iterator[tuple[Child, str]]:
    with Child(serve_moving, {"transports": TRANSPORTS}) as child:
        yield child, child.recv()


def lives_and_serves(child: Child, address: str, transport: str, value: float) -> None:
    """Once it is told, the seed serves the model as it is."""
    assert child.request("update", "a reload") is None
    ours = Attention(0.0)
    assert tensorfork.fork_into(ours, address, transport=transport, timeout=SECONDS).verified
    assert set(values(ours).values()) == {value}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("move", ["share_memory", "offloaded", "a rebound .data", "a new parameter"])
def test_what_moved_is_refused_and_the_seed_lives(
    seed: tuple[Child, str], transport: str, move: str, verify: bool
) -> None:
    child, address = seed
    assert child.request("do", move) is None
    with pytest.raises(tensorfork.SeedMoved) as raised:
        tensorfork.fork_into(Attention(0.0), address, transport=transport, timeout=SECONDS, verify=verify)
    assert MOVES[move][1] in raised.value.tensors
    lives_and_serves(child, address, transport, 2.0)


@pytest.mark.parametrize("verify", [True, False])
def test_memory_that_is_freed_before_the_fork_is_refused_and_the_seed_lives(
    seed: tuple[Child, str], transport: str, verify: bool
) -> None:
    child, address = seed
    assert child.request("free") is None
    with pytest.raises(tensorfork.SeedMoved, match="it has other memory, or none"):
        tensorfork.fork_into(Attention(0.0), address, transport=transport, timeout=SECONDS, verify=verify)
    assert "UnsupportedTensor" in child.request("rescan")
    with pytest.raises(tensorfork.SeedChanged, match="freed or shrunk"):
        tensorfork.fork_into(Attention(0.0), address, transport=transport, timeout=SECONDS, verify=verify)


class Splitting(Transport):
    """A transport, with pieces so small that there are many copies of one tensor."""

    def __new__(cls, name: str) -> Any:
        transport = registry.load(name)
        transport.piece = 64 << 10
        return transport


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("request_", [("free",), ("do", "share_memory"), ("update", "a new parameter")], ids=str)
def test_memory_that_goes_under_way_is_never_a_success(
    seed: tuple[Child, str], transport: str, request_: tuple[str, ...], verify: bool
) -> None:
    child, address = seed
    moving = under_way(lambda: child.request(*request_), Splitting(transport))
    with pytest.raises((tensorfork.SeedMoved, tensorfork.SeedChanged)) as raised:
        tensorfork.fork_into(Attention(0.0), address, transport=moving, timeout=SECONDS, verify=verify)
    assert isinstance(raised.value, tensorfork.SeedChanged if request_[0] == "update" else tensorfork.SeedMoved)
    if request_[0] != "free":
        lives_and_serves(child, address, transport, 2.0)
    else:
        assert "UnsupportedTensor" in child.request("rescan")


def test_a_seed_that_is_suspended_under_way_and_loses_its_memory_lives(seed: tuple[Child, str], transport: str) -> None:
    child, address = seed

    def sleep() -> None:
        assert child.request("suspend", SECONDS) is None
        assert child.request("free") is None

    with pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork_into(Attention(0.0), address, transport=under_way(sleep, Splitting(transport)), timeout=SECONDS)
    assert "UnsupportedTensor" in child.request("resume")
