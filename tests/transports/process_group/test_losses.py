"""Forks over process groups, gloo and nccl, in which a side dies or stops in mid-transfer.

What must be under way then is held up by the seed's rate limit, never by sleeping.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_leases import wait_until
from group_seeds import BACKENDS, SECONDS, SLOW, Backend, equal, model, published, transport
from processes import Child

import tensorfork
from tensorfork import TransferFailed

MANY = 4 << 20
"""Bytes of such a transfer."""
LONG = {"gloo": 4.0, "nccl": 12.0}
"""Seconds for a fork with such a transfer; to make a communicator of NCCL's takes some."""


def slow_seed(pipe: Any, name: str, device: str) -> None:
    """Publishes, slowly; says how many leases it has when asked."""
    with tensorfork.publish(model(device, [MANY], 13), transports=[transport(name, rate_limit=SLOW)]) as seed:
        pipe.send(seed.address)
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            computed = int((torch.ones(8, device=device) * 2).sum())  # the engine works on
            pipe.send((seed.stats().running, seed.stats().expired, computed))


def slow_fork(pipe: Any, name: str, device: str, address: str, seconds: float) -> None:
    """Forks, and says when bytes have arrived."""
    said: list[int] = []

    def progress(moved: int, total: int) -> None:
        if moved and not said:
            said.append(moved)
            pipe.send("under way")

    started = time.monotonic()
    try:
        tensorfork.fork_into(model(device, [MANY]), address, transport=fine(name), timeout=seconds, progress=progress)
    except tensorfork.TensorForkError as error:
        pipe.send((type(error).__name__, time.monotonic() - started))
    pipe.recv()


def fine(name: str) -> tensorfork.Transport:
    """One that reports progress often."""
    return transport(name, parcel=MANY // 16, bucket=MANY // 16, small=1000)


def whole_fork(name: str, device: str, address: str) -> None:
    ours = model(device, [MANY])
    tensorfork.fork_into(ours, address, transport=name, timeout=SECONDS)
    assert equal(ours, model("cpu", [MANY], 13))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_outlives_forks_that_are_stopped_and_killed_in_mid_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.recv()
        with (
            Child(slow_fork, name, here, address, LONG[name]) as stopped,
            Child(slow_fork, name, here, address, LONG[name]) as killed,
        ):
            assert stopped.recv() == "under way"
            stopped.stop()
            assert killed.recv() == "under way"
            killed.kill()
            whole_fork(name, here, address)  # while the others' leases may still run
            wait_until(lambda: seed.request("leases")[0] == 0)
            assert seed.request("leases")[2] == 16
        whole_fork(name, here, address)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_outlives_a_seed_that_is_stopped_and_one_that_is_killed_in_mid_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.recv()

        def fail(happen: Callable[[], None]) -> dict[str, torch.Tensor]:
            happened: list[int] = []

            def progress(moved: int, total: int) -> None:
                if moved and not happened:
                    happened.append(moved)
                    happen()

            ours = model(here, [MANY])
            started = time.monotonic()
            with pytest.raises(TransferFailed):
                tensorfork.fork_into(ours, address, transport=fine(name), timeout=LONG[name], progress=progress)
            assert time.monotonic() - started < LONG[name] + 6.0
            assert happened
            return ours

        ours = fail(seed.stop)
        kept = {k: v.clone() for k, v in ours.items()}
        seed.resume()
        whole_fork(name, here, address)
        assert equal(ours, kept), "something was written after the failure"
        fail(seed.kill)
    with published(("", there, [1000], 14)) as other:
        tensorfork.fork_into(model(here, [1000]), other, transport=name, timeout=SECONDS)
