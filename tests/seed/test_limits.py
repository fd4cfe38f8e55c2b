"""What a seed grants: leases in all, leases of one connection."""

import inspect
import math
from typing import Any

import pytest
from seed_leases import SECONDS, check, connected, model, take, until

import tensorfork
from tensorfork.seed import handle
from tensorfork.seed.limits import Limits

BAD = {
    "leases": [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("4", TypeError)],
    "leases_per_connection": [(0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError)],
    "stall": [*((one, ValueError) for one in (0, 0.05, -1, math.nan, math.inf, 86_401)), ("15", TypeError)],
    "rate_limit": [*((one, ValueError) for one in (0, -1, math.nan, math.inf)), ("1e9", TypeError), (True, TypeError)],
}


@pytest.mark.parametrize(("name", "value", "error"), [(name, *one) for name, ones in BAD.items() for one in ones])
def test_what_cannot_be_is_an_error_before_anything_happens(
    name: str, value: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "SeedService", None)  # nothing is made
    with pytest.raises(error, match=f"{name} "):
        tensorfork.publish(model(), **{name: value})


def test_the_defaults_are_those_of_publish() -> None:
    parameters, limits = inspect.signature(tensorfork.publish).parameters, Limits()
    assert {name: parameters[name].default for name in BAD} == {name: getattr(limits, name) for name in BAD}


def test_a_fork_beyond_the_leases_is_refused_and_hears_which_limit() -> None:
    with tensorfork.publish(model(), leases=2) as seed, connected(seed.address) as conversation:
        leases = [take(conversation) for _ in range(2)]
        with pytest.raises(tensorfork.PeerRefused, match=r"has 2 leases already.*publish\(leases=2\)"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        check(conversation, leases[0].lease, release=True)
        until(lambda: seed.stats().running < 2, "a lease ends")
        tensorfork.fork(seed.address, timeout=SECONDS)
        stats = seed.stats()
        assert (stats.granted, stats.refused) == (3, 1)


def test_one_connection_gets_its_share_and_others_theirs() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as greedy, connected(seed.address) as other:
        mine = [take(greedy) for _ in range(4)]
        with pytest.raises(tensorfork.PeerRefused, match=r"has 4 leases already.*publish\(leases_per_connection=4\)"):
            take(greedy)
        take(other)
        tensorfork.fork(seed.address, timeout=SECONDS)
        check(greedy, mine[0].lease, release=True)
        until(lambda: seed._service._leases.of(_peer(seed, mine[1].lease)) < 4, "a lease ends")
        take(greedy)


def _peer(seed: tensorfork.Seed, lease: bytes) -> bytes:
    found = seed._service._leases.get(lease)
    assert found is not None
    return found.peer
