"""A seed that is changed, or suspended, for longer than a fork may take: the error says that, whatever failed last."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from lying_seeds import Liar, kind_of

import tensorfork

pytestmark = pytest.mark.slow

SHORT = 0.5
TERMS = [{"restarts": 10**6}, {"wait": 60.0}, {"wait": float("inf")}]
SECONDS = 20.0


def model() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(1000), "b": torch.zeros(1000)}


@contextmanager
def suspended(seed: tensorfork.Seed) -> Iterator[None]:
    seed.suspend()
    try:
        yield
    finally:
        seed.resume()


@pytest.mark.parametrize("restarts", [0, 2, 10**6])
def test_an_update_longer_than_the_timeout_is_said_to_be_one(restarts: int) -> None:
    with tensorfork.publish(model()) as seed:
        with seed.updating(), pytest.raises(tensorfork.SeedChanged, match="weights are being changed"):
            tensorfork.fork(seed.address, restarts=restarts, timeout=SHORT)
        assert tensorfork.fork(seed.address, restarts=restarts, timeout=SECONDS).keys() == model().keys()


@pytest.mark.parametrize("terms", [{}, *TERMS], ids=str)
def test_a_seed_suspended_for_longer_than_the_timeout_is_said_to_be(terms: dict[str, Any]) -> None:
    with (
        tensorfork.publish(model()) as seed,
        suspended(seed),
        pytest.raises(tensorfork.SeedAsleep, match="suspended"),
    ):
        tensorfork.fork(seed.address, timeout=SHORT, **terms)


@pytest.mark.parametrize("restarts", [0, 10**6])
def test_a_change_that_raised_is_said_to_have_failed(restarts: int) -> None:
    with tensorfork.publish(model()) as seed:
        with pytest.raises(OSError, match="no space"), seed.updating():
            raise OSError("no space left")
        with pytest.raises(tensorfork.SeedChanged, match=r"the last change .* failed \(OSError: no space left\)"):
            tensorfork.fork(seed.address, restarts=restarts, timeout=SHORT)
        seed.rescan()
        assert tensorfork.fork(seed.address, restarts=restarts, timeout=SECONDS).keys() == model().keys()


Change = Callable[[tensorfork.Seed], AbstractContextManager[None]]


@pytest.mark.parametrize(("change", "error", "terms"), [
    (tensorfork.Seed.updating, tensorfork.SeedChanged, TERMS[0]),
    (suspended, tensorfork.SeedAsleep, TERMS[0]),
    (suspended, tensorfork.SeedAsleep, TERMS[1]),
], ids=["updating", "suspended, restarts", "suspended, wait"])  # fmt: skip
def test_a_seed_that_then_answers_nothing_is_still_said_to_change(
    change: Change, error: type[Exception], terms: dict[str, Any]
) -> None:
    refused: list[str] = []

    def silent_after_a_refusal(frames: list[bytes]) -> list[bytes] | None:
        refused.append(kind_of(frames))
        return None if "Refused" in refused[:-1] else frames

    with (
        tensorfork.publish(model()) as seed,
        change(seed),
        Liar(seed.address, silent_after_a_refusal) as address,
        pytest.raises(error, match="at step lease") as caught,
    ):
        tensorfork.fork(address, timeout=1.0, **terms)
    assert isinstance(caught.value.__cause__, tensorfork.PeerUnreachable)
    assert caught.value.__notes__[0] == "The fork waited for that until its timeout of 1 s"


def test_a_transport_that_could_not_be_opened_in_the_time_left_is_not_to_blame() -> None:
    def end_the_change_at_the_first_refusal(frames: list[bytes]) -> list[bytes] | None:
        if kind_of(frames) == "Refused":
            change.close()
        return None if kind_of(frames) == "Say" else frames  # so that no group is created

    with tensorfork.publish(model(), transports=["gloo"]) as seed, ExitStack() as change:
        change.enter_context(seed.updating())
        with (
            Liar(seed.address, end_the_change_at_the_first_refusal) as address,
            pytest.raises(tensorfork.SeedChanged, match="weights are being changed") as caught,
        ):
            tensorfork.fork(address, transport="gloo", restarts=10, timeout=1.5)
    assert isinstance(caught.value.__cause__, tensorfork.TransportUnavailable)
