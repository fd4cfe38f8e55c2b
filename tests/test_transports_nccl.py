"""Process groups of two: gloo here, nccl where there are two GPUs (`-m gpu`); the same tests for both where it can be.

What must be under way when something happens is held up by the seed's rate limit, never by sleeping.
"""

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Child

import tensorfork
from tensorfork import TransferFailed, TransportUnavailable
from tensorfork.testing import TransportSuite
from tensorfork.transports.nccl import NCCL, Gloo
from tensorfork.transports.nccl.rendezvous import environment

SECONDS = 60.0
"""A deadline that is kept with ease."""
SLOW = 4 << 20
"""Bytes a second, of a transfer in the middle of which something happens."""
MANY = 4 << 20
"""Bytes of such a transfer."""
LONG = {"gloo": 4.0, "nccl": 12.0}
"""Seconds for a fork with such a transfer; to make a communicator of NCCL's takes some."""


class TestGloo(TransportSuite):
    big = 16 << 20

    def make(self) -> tensorfork.Transport:
        return Gloo(parcel=1 << 20)


@pytest.mark.gpu(1)
class TestGlooWithAGPU(TransportSuite):
    devices = (("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0"))
    ways = ("from a spawned process",)
    big = 16 << 20

    def make(self) -> tensorfork.Transport:
        return Gloo(parcel=1 << 20, bucket=1 << 20)


@pytest.mark.gpu(2)
class TestNCCL(TransportSuite):
    devices = (("cuda:0", "cuda:1"),)
    big = 64 << 20
    short = 3.0
    seconds = SECONDS

    def make(self) -> tensorfork.Transport:
        return NCCL(parcel=2 << 20, bucket=1 << 20, small=64 << 10)


BACKENDS = [
    pytest.param(("gloo", "cpu", "cpu"), id="gloo"),
    pytest.param(("nccl", "cuda:0", "cuda:1"), id="nccl", marks=pytest.mark.gpu(2)),
]
Backend = tuple[str, str, str]


def transport(name: str, **options: Any) -> tensorfork.Transport:
    return NCCL(**options) if name == "nccl" else Gloo(**options)


def model(device: str, sizes: Sequence[int], seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of bytes: the same for the same seed, or zeros."""
    draw = torch.Generator().manual_seed(seed or 0)
    made = {
        f"t{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=draw)
        if seed is not None
        else torch.zeros(nbytes, dtype=torch.uint8)
        for i, nbytes in enumerate(sizes)
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# Whole forks.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_all_sizes_is_forked(backend: Backend) -> None:
    name, there, here = backend
    sizes = [5 << 20, 300_000, 1, 7, 511, 1 << 20, 4097, 100_000]
    ours, theirs = model(here, sizes), model(there, sizes, 1)
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, transport=name, timeout=SECONDS)
    assert equal(ours, theirs)
    assert report.transport == name
    assert report.verified


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_small_tensors_are_forked(backend: Backend) -> None:
    name, there, here = backend
    draw = random.Random(1)
    sizes = [draw.randint(1, 3000) for _ in range(10_000)]
    ours, theirs = model(here, sizes), model(there, sizes, 2)
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport=name, timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_model_partly_on_the_cpu_is_forked_whole(device: str) -> None:
    sizes = [3 << 20, 70_000, 12]
    other = {"cuda:0": "cuda:1", "cuda:1": "cuda:0"}[device]
    theirs = model(device, sizes, 3) | {f"host.{k}": v for k, v in model("cpu", sizes, 4).items()}
    ours = model(other, sizes) | {f"host.{k}": v for k, v in model("cpu", sizes).items()}
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(2)
def test_a_model_leaves_the_gpu_and_comes_back_on_it() -> None:
    sizes = [3 << 20, 70_000, 12, 9 << 20]
    theirs = model("cuda:0", sizes, 5)
    ours = model("cuda:1", sizes[:2]) | dict(list(model("cpu", sizes).items())[2:])
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(4)
def test_a_model_on_two_gpus_is_forked_to_two_others() -> None:
    sizes = [30 << 20, 70_000, 12]
    theirs = {f"{d}.{k}": v for d in (0, 1) for k, v in model(f"cuda:{d}", sizes, 6 + d).items()}
    ours = {f"{d}.{k}": v for d in (0, 1) for k, v in model(f"cuda:{2 + d}", sizes).items()}
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forks_at_once_do_not_meet(backend: Backend) -> None:
    name, there, here = backend
    sizes = [2 << 20, 5000, 1 << 20]
    theirs = model(there, sizes, 7)
    forks = [model(here, sizes) for _ in range(2)]
    errors: list[BaseException] = []

    def fork(into: dict[str, torch.Tensor], address: str) -> None:
        try:
            tensorfork.fork_into(into, address, transport=name, timeout=SECONDS)
        except BaseException as error:
            errors.append(error)

    with tensorfork.publish(theirs, transports=[transport(name, rate_limit=SLOW)]) as seed:
        threads = [threading.Thread(target=fork, args=(into, seed.address), daemon=True) for into in forks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert not errors
    assert all(equal(into, theirs) for into in forks)


def test_a_seed_and_a_fork_meet_over_ipv6() -> None:
    ours, theirs = model("cpu", [100_000]), model("cpu", [100_000], 8)
    try:
        seed = tensorfork.publish(theirs, bind="tcp://[::1]:*")
    except OSError:
        pytest.skip("this host has no IPv6")
    with seed:
        tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.parametrize("bind", ["tcp://127.0.0.2:*", "tcp://localhost:*", "tcp://0.0.0.0:*"])
def test_a_seed_is_found_by_each_of_its_hosts_names(bind: str) -> None:
    ours, theirs = model("cpu", [100_000]), model("cpu", [100_000], 9)
    advertise = "localhost" if "127.0.0.2" not in bind else None
    with tensorfork.publish(theirs, bind=bind, advertise=advertise) as seed:
        tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert equal(ours, theirs)


def test_auto_says_why_it_passed_nccl_over() -> None:
    ours, theirs = model("cpu", [1000]), model("cpu", [1000], 10)
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
    assert report.transport == "zeromq"
    assert "NCCL" in report.passed_over["nccl"] or "GPU" in report.passed_over["nccl"]


def test_asking_for_nccl_by_name_gives_the_reason() -> None:
    theirs = model("cpu", [1000], 16)
    with tensorfork.publish(theirs) as seed, pytest.raises(TransportUnavailable, match=r"NCCL|GPU"):
        tensorfork.fork_into(model("cpu", [1000]), seed.address, transport="nccl", timeout=SECONDS)


def test_a_seed_sends_no_faster_than_its_rate_limit() -> None:
    ours, theirs = model("cpu", [3 << 20]), model("cpu", [3 << 20], 15)
    with tensorfork.publish(theirs, transports=[Gloo(rate_limit=4 << 20)]) as seed:
        report = tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert report.seconds["transfer"] > 0.6
    assert equal(ours, theirs)


# Beside the engine's own groups.


def in_the_default_group(pipe: Any, rank: int, store: str, name: str, device: str, address: str | None) -> None:
    """A process of an engine: reduces in its default group without pause, while it publishes or forks."""
    import torch.distributed as dist

    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(name, store=dist.FileStore(store, 2), rank=rank, world_size=2)
    before = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    enough, rounds = threading.Event(), 0

    def reduce() -> None:
        nonlocal rounds
        while True:
            sums = torch.tensor([rank + 1, int(enough.is_set())], device=device)
            dist.all_reduce(sums)
            assert int(sums[0]) == 3
            rounds += 1
            if int(sums[1]) == 2:
                return

    reducing = threading.Thread(target=reduce)
    reducing.start()
    sizes = [4 << 20, 1000, 200_000]
    if rank == 0:
        with tensorfork.publish(model(device, sizes, 11), transports=[transport(name)]) as seed:
            pipe.send(seed.address)
            pipe.recv()
        fine = True
    else:
        (address,) = pipe.recv()
        ours = model(device, sizes)
        tensorfork.fork_into(ours, address, transport=transport(name), timeout=SECONDS)
        fine = equal(ours, model("cpu", sizes, 11))
        pipe.send("forked")
    during = rounds
    enough.set()
    reducing.join(SECONDS)
    after = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    dist.destroy_process_group()
    pipe.send((fine, during > 0 and not reducing.is_alive(), before == after))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engines_default_group_works_on_meanwhile_and_is_not_touched(backend: Backend, tmp_path: Path) -> None:
    name, there, here = backend
    store = str(tmp_path / "store")
    with (
        Child(in_the_default_group, 0, store, name, there, None) as seed,
        Child(in_the_default_group, 1, store, name, here, None) as fork,
    ):
        fork.say(seed.hear())
        assert fork.hear() == "forked"
        seed.say("enough")
        assert seed.hear() == (True, True, True)
        assert fork.hear() == (True, True, True)


def test_the_environment_is_as_before_after_each_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORFORK_TEST_KEPT", "mine")
    monkeypatch.delenv("TENSORFORK_TEST_NEW", raising=False)
    before = dict(os.environ)
    with environment({"TENSORFORK_TEST_KEPT": "0", "TENSORFORK_TEST_NEW": "1"}):
        assert os.environ["TENSORFORK_TEST_KEPT"] == "0"
        assert os.environ["TENSORFORK_TEST_NEW"] == "1"
    assert dict(os.environ) == before


def test_a_fork_leaves_no_thread_file_or_variable_behind() -> None:
    ours, theirs = model("cpu", [100_000, 10]), model("cpu", [100_000, 10], 12)

    def once() -> None:
        with tensorfork.publish(theirs, transports=["gloo"]) as seed:
            tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
        gc.collect()

    once()
    before = dict(os.environ), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(3):
        once()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before[2])
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before[1])
    assert dict(os.environ) == before[0]


# A side dies, or stops.


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
        address = seed.hear()
        with (
            Child(slow_fork, name, here, address, LONG[name]) as stopped,
            Child(slow_fork, name, here, address, LONG[name]) as killed,
        ):
            assert stopped.hear() == "under way"
            stopped.stop()
            assert killed.hear() == "under way"
            killed.kill()
            whole_fork(name, here, address)  # while the others' leases may still run
            wait_until(lambda: seed.ask("leases")[0] == 0)
            assert seed.ask("leases")[2] == 16
        whole_fork(name, here, address)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_outlives_a_seed_that_is_stopped_and_one_that_is_killed_in_mid_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.hear()

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
        seed.go_on()
        whole_fork(name, here, address)
        assert equal(ours, kept), "something was written after the failure"
        fail(seed.kill)
    with tensorfork.publish(model(there, [1000], 14)) as other:
        tensorfork.fork_into(model(here, [1000]), other.address, transport=name, timeout=SECONDS)
