"""Forks over process groups, gloo and nccl, in which one side dies or stops during the transfer.

The seed's rate limit keeps the transfer going meanwhile; nothing sleeps for that.
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

NBYTES = 4 << 20
"""Bytes of the model, which take a second."""
TIMEOUTS = {"gloo": 4.0, "nccl": 12.0}
"""Seconds for a fork with such a transfer; creating a communicator of NCCL's takes some of them."""


def slow_seed(pipe: Any, name: str, device: str) -> None:
    """Publish with a low rate limit; on request, send how many leases run and have expired."""
    with tensorfork.publish(model(device, [NBYTES], 13), transports=[transport(name, rate_limit=SLOW)]) as seed:
        pipe.send(seed.address)
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            computed = int((torch.ones(8, device=device) * 2).sum())  # the engine goes on computing
            pipe.send((seed.stats().running, seed.stats().expired, computed))


def slow_fork(pipe: Any, name: str, device: str, address: str, seconds: float) -> None:
    """Fork, and tell the parent when the first bytes have arrived, and how it failed."""
    reported: list[int] = []

    def progress(moved: int, total: int) -> None:
        if moved and not reported:
            reported.append(moved)
            pipe.send("under way")

    started = time.monotonic()
    try:
        tensorfork.fork_into(
            model(device, [NBYTES]), address, transport=fine_grained(name), timeout=seconds, progress=progress
        )
    except tensorfork.TensorForkError as error:
        pipe.send((type(error).__name__, time.monotonic() - started))
    pipe.recv()


def fine_grained(name: str) -> tensorfork.Transport:
    """A transport with small batches, so that progress is reported often."""
    return transport(name, parcel=NBYTES // 16, bucket=NBYTES // 16, small=1000)


def whole_fork(name: str, device: str, address: str) -> None:
    ours = model(device, [NBYTES])
    tensorfork.fork_into(ours, address, transport=name, timeout=SECONDS)
    assert equal(ours, model("cpu", [NBYTES], 13))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_outlives_forks_that_are_stopped_and_killed_during_the_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.recv()
        with (
            Child(slow_fork, name, here, address, TIMEOUTS[name]) as stopped,
            Child(slow_fork, name, here, address, TIMEOUTS[name]) as killed,
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
def test_a_fork_outlives_a_seed_that_is_stopped_and_one_that_is_killed_during_the_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.recv()

        def fork_fails_when(event: Callable[[], None]) -> dict[str, torch.Tensor]:
            happened: list[int] = []

            def progress(moved: int, total: int) -> None:
                if moved and not happened:
                    happened.append(moved)
                    event()

            ours = model(here, [NBYTES])
            started = time.monotonic()
            with pytest.raises(TransferFailed):
                tensorfork.fork_into(
                    ours, address, transport=fine_grained(name), timeout=TIMEOUTS[name], progress=progress
                )
            assert time.monotonic() - started < TIMEOUTS[name] + 6.0
            assert happened
            return ours

        ours = fork_fails_when(seed.stop)
        before = {k: v.clone() for k, v in ours.items()}
        seed.resume()
        whole_fork(name, here, address)
        assert equal(ours, before), "something was written after the failure"
        fork_fails_when(seed.kill)
    with published(("", there, [1000], 14)) as other:
        tensorfork.fork_into(model(here, [1000]), other, transport=name, timeout=SECONDS)
