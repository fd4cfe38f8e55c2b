"""On GPUs: the suite over CUDA IPC and ZeroMQ, whole forks of odd models, and the digest beside the CPU's."""

import random
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
from digest_inputs import digest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorfork
from tensorfork.digest import batch
from tensorfork.memory import cuda, streams
from tensorfork.testing import TransportSuite
from tensorfork.transports.cuda_ipc import CudaIpc
from tensorfork.transports.zeromq import ZeroMQ

ONE = [("cuda:0", "cuda:0")]
TWO = [("cuda:0", "cuda:1")]


@pytest.mark.gpu(1)
class TestCudaIpcWithinAGpu(TransportSuite):
    devices = ONE
    one_sided = True

    def make(self) -> tensorfork.Transport:
        return CudaIpc()


@pytest.mark.gpu(2)
class TestCudaIpcBetweenGpus(TransportSuite):
    devices = TWO
    one_sided = True

    def make(self) -> tensorfork.Transport:
        return CudaIpc()


@pytest.mark.gpu(1)
class TestZeroMQWithinAGpu(TransportSuite):
    devices = (*ONE, ("cuda:0", "cpu"), ("cpu", "cuda:0"))

    def make(self) -> tensorfork.Transport:
        return ZeroMQ()


@pytest.mark.gpu(2)
class TestZeroMQBetweenGpus(TransportSuite):
    devices = TWO

    def make(self) -> tensorfork.Transport:
        return ZeroMQ(connections=3)


def other_gpu() -> str:
    return f"cuda:{torch.cuda.device_count() - 1}"


def odd_model(device: str, fill: bool) -> dict[str, torch.Tensor]:
    """Everything that is not a plain contiguous tensor, and some that are."""
    torch.manual_seed(7)

    def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (nbytes,), dtype=torch.uint8)
        return (raw if fill else torch.zeros_like(raw)).to(device).view(dtype).view(shape)

    whole = make((300, 64))
    fused = make((3 * 128, 64), torch.bfloat16)
    model = {
        "plain": make((513, 37), torch.float16),
        "transposed": make((40, 70)).t(),
        "strided": whole[:, ::2],
        "whole": whole,
        "many stretches": make((9000, 8), torch.bfloat16)[:, ::3],
        "q": fused[:128],
        "k": fused[128:256],
        "v": fused[256:],
        "bool": make((1001,), torch.bool),
        "complex": make((33,), torch.complex64),
        "fp8": make((777,), torch.float8_e4m3fn),
        "int8": make((5, 5, 5), torch.int8),
        "scalar": make((), torch.float64),
        "empty": make((0, 4)),
        "odd bytes": make((10_003,), torch.uint8)[1:],
    }
    return model | {"tied": model["plain"]}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(
        one.cpu().contiguous().view(-1).view(torch.uint8), other.cpu().contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.gpu(1)
@pytest.mark.parametrize("transport", ["cuda_ipc", "zeromq"])
@pytest.mark.parametrize("to", ["same", "other"])
def test_an_odd_model_is_forked_in_place_byte_for_byte(transport: str, to: str) -> None:
    device = "cuda:0" if to == "same" else other_gpu()
    model, copy = odd_model("cuda:0", fill=True), odd_model(device, fill=False)
    with tensorfork.publish(model) as seed:
        report = tensorfork.fork_into(copy, seed.address, transport=transport)
    assert report.verified
    assert [name for name in model if model[name].numel() and not same_bytes(model[name], copy[name])] == []
    assert copy["tied"] is copy["plain"]


@pytest.mark.gpu(1)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_is_forked_without_one_to_where_it_is_wanted(device: str) -> None:
    model = odd_model("cuda:0", fill=True)
    with tensorfork.publish(model) as seed:
        copy = tensorfork.fork(seed.address, device=device)
    assert {tensor.device.type for tensor in copy.values()} == {device}
    assert [name for name in model if model[name].numel() and not same_bytes(model[name], copy[name])] == []


@pytest.mark.gpu(1)
def test_a_model_partly_on_the_cpu_is_forked_whole_over_cuda_ipc() -> None:
    model = {"gpu": torch.randn(1 << 20, device="cuda"), "cpu": torch.randn(700_001)}
    copy = {"gpu": torch.zeros(1 << 20, device="cuda"), "cpu": torch.zeros(700_001)}
    with tensorfork.publish(model) as seed:
        report = tensorfork.fork_into(copy, seed.address)
    assert report.transport == "cuda_ipc"
    assert torch.equal(model["gpu"], copy["gpu"])
    assert torch.equal(model["cpu"], copy["cpu"])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["cuda_ipc", "zeromq"])
def test_a_model_on_two_gpus_is_forked_whole(transport: str) -> None:
    model = {name: torch.randn(1 << 20, device=name) for name in ("cuda:0", "cuda:1")}
    copy = {name: torch.zeros(1 << 20, device=name) for name in ("cuda:0", "cuda:1")}
    with tensorfork.publish(model) as seed:
        tensorfork.fork_into(copy, seed.address, transport=transport)
    assert all(torch.equal(model[name], copy[name]) for name in model)


@pytest.mark.gpu(1)
def test_a_fork_to_the_cpu_is_made_by_the_next_transport_and_says_why() -> None:
    model = {"w": torch.randn(1000, device="cuda")}
    copy = {"w": torch.zeros(1000)}
    with tensorfork.publish(model) as seed:
        report = tensorfork.fork_into(copy, seed.address)
    assert report.transport == "zeromq"
    assert "cuda_ipc" in report.passed_over
    assert torch.equal(model["w"].cpu(), copy["w"])


@pytest.mark.gpu(1)
def test_a_meta_model_takes_one_allocation_on_the_gpu() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(50)])
    original = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(50)]).cuda()
    parameter = model[3].weight
    with tensorfork.publish(original) as seed:
        tensorfork.fork_into(model, seed.address)
    assert model[3].weight is parameter
    assert len({tensor.untyped_storage().data_ptr() for tensor in model.parameters()}) == 1
    x = torch.randn(5, 64, device="cuda")
    assert torch.equal(model(x), original(x))


IN_ANOTHER_PROCESS = textwrap.dedent(
    """
    import sys, torch, tensorfork
    model = {str(i): torch.full((1 << 20,), float(i), device="cuda") for i in range(20)}
    with tensorfork.publish(model) as seed:
        print(seed.address, flush=True)
        sys.stdin.read()
    """
)


@pytest.mark.gpu(2)
def test_processes_that_see_one_gpu_each_fork_over_cuda_ipc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed sees the second GPU alone, as cuda:0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    seed = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert seed.stdout is not None
        address = seed.stdout.readline().strip()
        copy = {str(i): torch.zeros(1 << 20, device="cuda:0") for i in range(20)}
        report = tensorfork.fork_into(copy, address)
        assert report.transport == "cuda_ipc"
        assert all(bool((copy[str(i)] == float(i)).all()) for i in range(20))
    finally:
        seed.communicate(timeout=60)


ALONE = textwrap.dedent(
    """
    import sys, torch, tensorfork
    torch.empty(1, device="cuda:1")
    assert not torch._C._cuda_hasPrimaryContext(0), "torch itself makes one"
    got = tensorfork.fork(sys.argv[1], device="cuda:1", transport=sys.argv[2], timeout=60)
    assert all(bool((got[str(i)] == float(i)).all()) for i in range(20))
    print("another context" if torch._C._cuda_hasPrimaryContext(0) else "no other context")
    """
)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["cuda_ipc", "transfer_engine:nvlink", "zeromq", "nccl"])
def test_a_fork_makes_no_context_on_a_gpu_that_is_not_its_own(transport: str) -> None:
    """Half a gigabyte of the seed's GPU. Nor does it where torch's current device is another than the fork's."""
    model = {str(i): torch.full((1 << 18,), float(i), device="cuda:0") for i in range(20)}
    with tensorfork.publish(model) as seed:
        done = subprocess.run(
            [sys.executable, "-c", ALONE, seed.address, transport],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no other context"


EXPANDABLE = textwrap.dedent(
    """
    import torch, tensorfork
    model = {"w": torch.randn(1 << 20, device="cuda")}
    copy = {"w": torch.zeros(1 << 20, device="cuda")}
    from tensorfork.transports.cuda_ipc import CudaIpc
    from tensorfork.transports.base import Region
    region = Region(0, model["w"].data_ptr(), model["w"].nbytes, "cuda:0")
    print(CudaIpc().facts([region])["closed"])
    with tensorfork.publish(model) as seed:
        print(tensorfork.fork_into(copy, seed.address))
    assert torch.equal(model["w"], copy["w"])
    """
)


@pytest.mark.gpu(1)
def test_expandable_segments_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    done = subprocess.run([sys.executable, "-c", EXPANDABLE], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "expandable_segments" in done.stdout


@pytest.mark.gpu(1)
def test_handles_are_closed_when_the_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    closed: list[int] = []
    open_handle, close_handle = cuda.open_ipc_handle, cuda.close_ipc_handle

    def counted_open(handle: bytes) -> int:
        opened.append(open_handle(handle))
        return opened[-1]

    def counted_close(address: int) -> None:
        closed.append(address)
        close_handle(address)

    monkeypatch.setattr(cuda, "open_ipc_handle", counted_open)
    monkeypatch.setattr(cuda, "close_ipc_handle", counted_close)
    seed = subprocess.Popen(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert seed.stdout is not None
        copy = {str(i): torch.zeros(1 << 20, device="cuda:0") for i in range(20)}
        tensorfork.fork_into(copy, seed.stdout.readline().strip(), transport="cuda_ipc")
    finally:
        seed.communicate(timeout=60)
    assert opened
    assert sorted(opened) == sorted(closed)


@pytest.mark.gpu(1)
def test_streams_of_our_own_are_used_again_and_are_nobody_elses() -> None:
    first, second = streams.acquire_stream(0), streams.acquire_stream(0)
    assert first.cuda_stream != second.cuda_stream
    assert {first.cuda_stream, second.cuda_stream}.isdisjoint(torch.cuda.Stream().cuda_stream for _ in range(64))
    streams.release_stream(first)
    assert streams.acquire_stream(0) is first
    with streams.on_stream(second):
        assert int(torch.ones(10, device="cuda").sum()) == 10


@pytest.mark.gpu(1)
def test_a_change_under_the_fork_on_a_gpu_is_never_taken_for_a_model() -> None:
    model = {str(i): torch.zeros(1 << 18, device="cuda") for i in range(20)}
    stop = threading.Event()
    with tensorfork.publish(model) as seed:

        def change() -> None:
            k = 0.0
            while not stop.is_set():
                k += 1
                with seed.updating():
                    for tensor in model.values():
                        tensor.fill_(k)

        changer = threading.Thread(target=change)
        changer.start()
        taken = 0
        try:
            for _ in range(200):
                copy = {name: torch.full_like(tensor, -1.0) for name, tensor in model.items()}
                try:
                    tensorfork.fork_into(copy, seed.address, transport="cuda_ipc", verify=taken % 2 == 0)
                except tensorfork.SeedChanged:
                    continue
                taken += 1
                assert (
                    len({float(tensor.min()) for tensor in copy.values()} | {float(t.max()) for t in copy.values()})
                    == 1
                )
        finally:
            stop.set()
            changer.join()


@pytest.mark.gpu(1)
def test_a_captured_graph_is_not_broken_by_forks() -> None:
    model = {str(i): torch.randn(1 << 20, device="cuda") for i in range(30)}
    a, w = torch.randn(64, 1024, device="cuda"), torch.randn(1024, 1024, device="cuda")
    torch.mm(a, w)
    torch.cuda.synchronize()
    fork = textwrap.dedent(
        """
        import sys, tensorfork
        for transport in ("cuda_ipc", "zeromq", "cuda_ipc"):
            tensorfork.fork(sys.argv[1], transport=transport)
        """
    )
    captured = 0
    with tensorfork.publish(model) as seed:
        forks = subprocess.Popen([sys.executable, "-c", fork, seed.address])
        while forks.poll() is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x = a
                for _ in range(100):
                    x = torch.mm(x, w) * 0.01
            graph.replay()
            torch.cuda.synchronize()
            captured += 1
        assert forks.returncode == 0
    assert captured


FORMS = st.sampled_from(["plain", "offset", "transposed", "gaps", "expanded"])
DTYPES = [
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex128,
    torch.float8_e5m2,
]


def form_of(name: str, raw: torch.Tensor, dtype: torch.dtype, n: int) -> torch.Tensor:
    flat = raw[: n * dtype.itemsize].view(dtype)
    if name == "offset":
        return flat[1:] if n > 1 else flat
    rows = max(1, n // 7)
    if name == "transposed":
        return flat[: rows * 7].view(rows, 7).t() if n >= 7 else flat
    if name == "gaps":
        return flat[::3]
    return flat[: min(n, 50)].expand(4, min(n, 50)) if name == "expanded" else flat


@pytest.mark.gpu(1)
@settings(max_examples=120)
@given(data=st.data())
def test_the_digest_is_the_same_on_gpu_and_cpu(data: Any) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.integers(1, 3_000) | st.integers(1_000_000, 2_500_000))
    draw = random.Random(data.draw(st.integers(0, 1 << 30)))
    raw = torch.frombuffer(bytearray(draw.randbytes(n * dtype.itemsize)), dtype=torch.uint8)
    raw = raw % 2 if dtype is torch.bool else raw
    name = data.draw(FORMS)
    here, there = form_of(name, raw, dtype, n), form_of(name, raw.cuda(), dtype, n)
    assert batch.DigestBatch.of({"x": there}).compute()["x"] == digest(here)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("shape", ["one", "many", "experts"])
def test_the_digests_of_a_model_on_a_gpu_take_at_most_16_mib(shape: str) -> None:
    if shape == "one":
        tensors = {"w": torch.empty(1 << 30, dtype=torch.uint8, device="cuda")}
    elif shape == "many":
        tensors = {
            str(i): torch.empty(4096, 1024 + 64 * (i % 5), dtype=torch.bfloat16, device="cuda") for i in range(60)
        }
    else:
        tensors = {str(i): torch.empty(768, 1024, dtype=torch.bfloat16, device="cuda") for i in range(600)}
    checksums = batch.DigestBatch.of(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checksums.compute()
    assert torch.cuda.max_memory_allocated() - before <= 16 << 20
