"""Process groups of two: gloo, and nccl where there are two GPUs (`-m gpu`); the same tests where possible."""

import gc
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_leases import wait_until
from group_seeds import BACKENDS, SECONDS, SLOW, Backend, equal, model, published, transport
from processes import Child

import tensorfork
from tensorfork import TransportUnavailable
from tensorfork.interpreter.environment import environment
from tensorfork.testing import TransportSuite
from tensorfork.transports.process_group import NCCL, Gloo


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
    ways = ("from a spawned process",)
    big = 64 << 20
    short = 3.0
    seconds = SECONDS

    def make(self) -> tensorfork.Transport:
        return NCCL(
            parcel=512 << 10, bucket=512 << 10, small=64 << 10
        )  # `big` is a hundred batches, which take a while


# Whole forks.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_all_sizes_is_forked(backend: Backend) -> None:
    name, there, here = backend
    sizes = [5 << 20, 300_000, 1, 7, 511, 1 << 20, 4097, 100_000]
    ours = model(here, sizes)
    with published(("", there, sizes, 1)) as address:
        report = tensorfork.fork_into(ours, address, transport=name, timeout=SECONDS)
    assert equal(ours, model("cpu", sizes, 1))
    assert report.transport == name
    assert report.verified


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_small_tensors_are_forked(backend: Backend) -> None:
    name, there, here = backend
    draw = random.Random(1)
    sizes = [draw.randint(1, 3000) for _ in range(10_000)]
    ours = model(here, sizes)
    with published(("", there, sizes, 2)) as address:
        tensorfork.fork_into(ours, address, transport=name, timeout=SECONDS)
    assert equal(ours, model("cpu", sizes, 2))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_model_partly_on_the_cpu_is_forked_whole(device: str) -> None:
    sizes = [3 << 20, 70_000, 12]
    other = {"cuda:0": "cuda:1", "cuda:1": "cuda:0"}[device]
    ours, host = model(other, sizes), model("cpu", sizes)
    with published(("", device, sizes, 3), ("host.", "cpu", sizes, 4)) as address:
        into = ours | {f"host.{k}": v for k, v in host.items()}
        tensorfork.fork_into(into, address, transport="nccl", timeout=SECONDS)
    assert equal(ours, model("cpu", sizes, 3))
    assert equal(host, model("cpu", sizes, 4))


@pytest.mark.gpu(2)
def test_a_model_on_a_gpu_is_forked_to_another_gpu_and_the_cpu() -> None:
    sizes = [3 << 20, 70_000, 12, 9 << 20]
    ours = model("cuda:1", sizes[:2]) | dict(list(model("cpu", sizes).items())[2:])
    with published(("", "cuda:0", sizes, 5)) as address:
        tensorfork.fork_into(ours, address, transport="nccl", timeout=SECONDS)
    assert equal(ours, model("cpu", sizes, 5))


@pytest.mark.gpu(4)
def test_a_model_on_two_gpus_is_forked_to_two_others() -> None:
    sizes = [30 << 20, 70_000, 12]
    first, second = model("cuda:2", sizes), model("cuda:3", sizes)
    with published(("0.", "cuda:0", sizes, 6), ("1.", "cuda:1", sizes, 7)) as address:
        into = {f"0.{k}": v for k, v in first.items()} | {f"1.{k}": v for k, v in second.items()}
        tensorfork.fork_into(into, address, transport="nccl", timeout=SECONDS)
    assert equal(first, model("cpu", sizes, 6))
    assert equal(second, model("cpu", sizes, 7))


@pytest.mark.gpu(2)
def test_nccl_within_one_process_is_refused_before_anything_starts() -> None:
    with tensorfork.publish(model("cuda:0", [1000], 17)) as seed:
        ours = model("cuda:1", [1000])
        with pytest.raises(TransportUnavailable, match=r"one process.*use cuda_ipc"):
            tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)


@pytest.mark.gpu(2)
def test_a_fork_does_not_wait_until_its_group_is_destroyed_and_the_next_one_does() -> None:
    sizes = [30 << 20, 70_000]
    with published(("", "cuda:0", sizes, 18)) as address:
        for _ in range(4):
            ours = model("cuda:1", sizes)
            report = tensorfork.fork_into(ours, address, transport="nccl", timeout=SECONDS)
            assert report.seconds["close"] < 0.2
            assert equal(ours, model("cpu", sizes, 18))


@pytest.mark.gpu(2)
def test_a_process_that_ends_right_after_its_fork_ends_well() -> None:
    script = "import sys, tensorfork\ntensorfork.fork(sys.argv[1], device='cuda:1', transport='nccl', timeout=60.0)\n"
    with published(("", "cuda:0", [30 << 20, 70_000], 19)) as address:
        ended = subprocess.run([sys.executable, "-c", script, address], capture_output=True, timeout=SECONDS, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forks_at_once_do_not_mix_their_groups(backend: Backend) -> None:
    name, there, here = backend
    sizes = [2 << 20, 5000, 1 << 20]
    forks = [model(here, sizes) for _ in range(2)]
    errors: list[BaseException] = []

    def fork(into: dict[str, torch.Tensor], address: str) -> None:
        try:
            tensorfork.fork_into(into, address, transport=name, timeout=SECONDS)
        except BaseException as error:
            errors.append(error)

    with published(("", there, sizes, 7), transports=[transport(name, rate_limit=SLOW)]) as address:
        threads = [threading.Thread(target=fork, args=(into, address), daemon=True) for into in forks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert not errors
    assert all(equal(into, model("cpu", sizes, 7)) for into in forks)


def test_a_fork_over_ipv6_succeeds() -> None:
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


def test_auto_says_why_it_passed_over_nccl() -> None:
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


class ReduceLoop:
    """Reduces in torch's default group without pause, on a thread of its own, until both ranks ask to stop."""

    def __init__(self, rank: int, device: str) -> None:
        self._rank, self._device = rank, device
        self._stop, self._rounds = threading.Event(), 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait_for_another_round(self) -> None:
        before = self._rounds
        wait_until(lambda: self._rounds > before)

    def stop(self) -> bool:
        """Stop; whether the thread has ended."""
        self._stop.set()
        self._thread.join(SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            sums = torch.tensor([self._rank + 1, int(self._stop.is_set())], device=self._device)
            torch.distributed.all_reduce(sums)
            assert int(sums[0]) == 3
            self._rounds += 1
            if int(sums[1]) == 2:
                return


def in_the_default_group(pipe: Any, rank: int, store: str, name: str, device: str) -> None:
    """A process of an engine, which reduces in its default group without pause while it publishes or forks."""
    import torch.distributed as dist

    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(name, store=dist.FileStore(store, 2), rank=rank, world_size=2)
    before = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    loop = ReduceLoop(rank, device)
    loop.wait_for_another_round()
    sizes = [4 << 20, 1000, 200_000]
    if rank == 0:
        with tensorfork.publish(model(device, sizes, 11), transports=[transport(name)]) as seed:
            pipe.send(seed.address)
            pipe.recv()
            loop.wait_for_another_round()
        equals_seed = True
    else:
        (address,) = pipe.recv()
        ours = model(device, sizes)
        tensorfork.fork_into(ours, address, transport=transport(name), timeout=SECONDS)
        equals_seed = equal(ours, model("cpu", sizes, 11))
        loop.wait_for_another_round()
        pipe.send("forked")
    stopped = loop.stop()
    after = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    dist.destroy_process_group()
    pipe.send((equals_seed, stopped, before == after))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engines_default_group_keeps_working_and_is_not_touched(backend: Backend, tmp_path: Path) -> None:
    name, there, here = backend
    store = str(tmp_path / "store")
    with (
        Child(in_the_default_group, 0, store, name, there) as seed,
        Child(in_the_default_group, 1, store, name, here) as fork,
    ):
        fork.send(seed.recv())
        assert fork.recv() == "forked"
        seed.send("stop")
        assert seed.recv() == (True, True, True)
        assert fork.recv() == (True, True, True)


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
