"""A proxy that replays, reorders, truncates and swaps messages: forks are right, or errors of ours; the seed lives."""

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from hostile import Seed
from meddling import Meddler, Meddling, Reorder, Replay, Swap, SwapBytes, Truncate
from processes import Child, serve
from seed_leases import connected, take, until

import tensorfork

pytestmark = pytest.mark.slow

SECONDS = 1.5
"""A fork's deadline, where what it waits for does not come."""
ROUNDS = 4


def two_models() -> dict[str, torch.Tensor]:
    """Of equal shapes: an answer to one fits the other."""
    return {f"{part}.{i}": torch.full((300_000,), 1.0 + i + 100 * j) for j, part in enumerate("ab") for i in range(16)}


@pytest.fixture(scope="module")
def seed() -> Iterator[Seed]:
    with Child(serve, two_models) as child:
        yield Seed(child)


def fork(address: str, part: str, ended: "list[str | None]") -> None:
    """Fork a part of what is there, and note the error, or that there was none."""
    wanted = {name: tensor for name, tensor in two_models().items() if name.startswith(part)}
    ours = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    try:
        report = tensorfork.fork_into(ours, address, include=f"{part}.*", timeout=SECONDS)
    except tensorfork.TensorForkError as error:
        ended.append(type(error).__name__)
        return
    if report.verified and all(torch.equal(ours[name], tensor) for name, tensor in wanted.items()):
        ended.append(None)


def fork_both(address: str) -> "list[str | None]":
    """Two forks at once, of two parts; how each ended."""
    ended: list[str | None] = []
    threads = [threading.Thread(target=fork, args=(address, part, ended)) for part in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


@pytest.mark.parametrize("how", [Meddling, Replay, Reorder, Truncate, Swap, SwapBytes])
def test_messages_that_are_meddled_with_make_forks_that_are_right_or_errors(seed: Seed, how: type[Meddling]) -> None:
    meddlings = [how(random.Random(number)) for number in range(ROUNDS)]
    for i, meddling in enumerate(meddlings):
        with Meddler(seed.address, meddling, data_alone=i % 2 == 0) as address, connected(seed.address) as first:
            take(first)  # which has the largest answers; those of all others are of one size
            ended = fork_both(address)
        assert len(ended) == 2, "a fork counted as right, and was wrong; or it raised what is no error of ours"
        assert how is not Meddling or ended == [None, None]
    assert how is Meddling or any(meddling.times for meddling in meddlings)
    until(lambda: seed.child.request("stats").running == 0, "every lease has ended")
    assert fork_both(seed.address) == [None, None]
    assert seed.child.request("errors") == []
