"""The suite that every transport must pass, over real Mooncake; and whole forks between two GPUs."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from engine_seeds import SOON, needs_mooncake
from processes import Child

import tensorfork
from tensorfork.testing import TransportSuite
from tensorfork.transports.transfer_engine import TransferEngine


@needs_mooncake
class TestOverTcp(TransportSuite):
    one_sided = True
    big = 24 << 20
    under_way = 2.0

    def make(self) -> tensorfork.Transport:
        return TransferEngine(fabric="tcp")


@needs_mooncake
@pytest.mark.gpu(2)
class TestOverNvlink(TransportSuite):
    devices = (("cuda:0", "cuda:1"), ("cuda:1", "cuda:1"))
    ways = ("from a spawned process",)
    one_sided = True

    def make(self) -> tensorfork.Transport:
        return TransferEngine(fabric="nvlink")


@needs_mooncake
@pytest.mark.gpu(2)
class TestGpusOverTcp(TransportSuite):
    devices = (("cuda:0", "cuda:1"),)
    ways = ("from a spawned process",)
    one_sided = True
    big = 24 << 20

    def make(self) -> tensorfork.Transport:
        return TransferEngine(fabric="tcp")


# A whole fork over NVLink, in every shape of memory that a model comes in.


def tensors(device: str, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Tensors placed by the allocator."""
    return {f"t{i}": torch.arange(size, device=device).mul_(31 + i).to(torch.uint8) for i, size in enumerate(sizes)}


def seeds(pipe: Connection) -> None:
    """Publish on the first GPU what is asked for, and answer with the address, until told to end."""
    kept: list[Any] = []
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            break
        if what == "tensors":
            kept.append(tensors("cuda:0", *args))
        elif what == "views":  # of one allocation, and a second seed that shares some of it
            arena = torch.arange(1 << 20, device="cuda:0").to(torch.uint8)
            kept.append({f"t{i}": arena[i * 1000 : i * 1000 + 900] for i in range(1000)})
            kept.append(tensorfork.publish({"t0": arena[:1000]}, transports=["transfer_engine:nvlink"]))
            kept.append(kept[-2])
        elif what == "anew":  # free the last model, and have the allocator map its memory anew
            kept.pop().close()
            kept.pop()
            torch.cuda.empty_cache()
            kept.append(tensors("cuda:0", *args))
        kept.append(tensorfork.publish(kept[-1], transports=["transfer_engine:nvlink"]))
        pipe.send(kept[-1].address)
    for one in kept:
        if isinstance(one, tensorfork.Seed):
            one.close()


@pytest.fixture(scope="module")
def seed() -> Iterator[Child]:
    with Child(seeds) as child:
        yield child


@needs_mooncake
@pytest.mark.gpu(2)
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_a_model_on_one_gpu_forks_to_another(seed: Child, count: int) -> None:
    sizes = [1 + 7919 * i % 300_000 for i in range(count)]
    wanted = tensors("cpu", sizes)
    address = seed.request("tensors", sizes)
    got = tensorfork.fork(address, device="cuda:1", transport="transfer_engine:nvlink", timeout=SOON)
    assert all(torch.equal(got[name].cpu(), wanted[name]) for name in wanted)
    model = {name: torch.empty_like(tensor, device="cuda:1") for name, tensor in wanted.items()}
    report = tensorfork.fork_into(model, address, transport="transfer_engine", timeout=SOON)
    assert (report.transport, report.fabric) == ("transfer_engine", "nvlink")
    assert all(torch.equal(model[name].cpu(), wanted[name]) for name in wanted)


@needs_mooncake
@pytest.mark.gpu(2)
def test_views_of_one_allocation_fork_while_another_seed_shares_it(seed: Child) -> None:
    got = tensorfork.fork(seed.request("views"), device="cuda:1", transport="transfer_engine:nvlink", timeout=SOON)
    arena = torch.arange(1 << 20).to(torch.uint8)
    assert all(torch.equal(got[f"t{i}"].cpu(), arena[i * 1000 : i * 1000 + 900]) for i in range(1000))


@needs_mooncake
@pytest.mark.gpu(2)
def test_memory_that_the_seed_has_mapped_anew_is_read_anew(seed: Child) -> None:
    sizes = [64 << 20, 1000]
    for _ in range(2):
        address = seed.request("tensors", sizes)
        tensorfork.fork(address, device="cuda:1", transport="transfer_engine:nvlink", timeout=SOON)
    address = seed.request("anew", [65 << 20, 2000])
    got = tensorfork.fork(address, device="cuda:1", transport="transfer_engine:nvlink", timeout=SOON)
    wanted = tensors("cpu", [65 << 20, 2000])
    assert all(torch.equal(got[name].cpu(), wanted[name]) for name in wanted)


@needs_mooncake
@pytest.mark.gpu(2)
def test_a_fork_with_a_tensor_on_the_cpu_says_why_nvlink_cannot_take_it(seed: Child) -> None:
    address = seed.request("tensors", [1000])
    with pytest.raises(tensorfork.TransportUnavailable, match="cuda_ipc takes both"):
        tensorfork.fork(address, device="cpu", transport="transfer_engine:nvlink", timeout=SOON)


@needs_mooncake
@pytest.mark.gpu(1)
def test_memory_of_expandable_segments_is_refused_with_the_remedy() -> None:
    program = """
        import tensorfork, torch
        model = {"a": torch.zeros(1000, device="cuda:0")}
        with tensorfork.publish(model, transports=["transfer_engine:nvlink"]) as seed:
            print(seed._service.model.publication.offered["transfer_engine"].facts["closed"])
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        timeout=SOON,
        check=True,
    )
    assert "Unset expandable_segments" in ended.stdout
