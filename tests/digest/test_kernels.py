"""The code for GPUs was compiled from the source beside it, and is chosen by a GPU's compute capability."""

import itertools
from importlib.resources import files

import pytest
import torch
from digest_inputs import digest, random_bytes

from tensorfork.digest import batch, kernels, torch_digests
from tensorfork.digest.definition import PIECE
from tensorfork.digest.kernels import build
from tensorfork.memory import cuda_kernel


def test_the_code_for_gpus_was_compiled_from_the_source() -> None:
    folder = files(kernels)
    ptx = (folder / "digest.ptx").read_text()
    assert ptx.startswith(build.stamp((folder / "digest.cu").read_text())), (
        "run python -m tensorfork.digest.kernels.build"
    )
    assert f".version {build.PTX_VERSION}" in ptx
    assert f".target sm_{build.OLDEST}" in ptx


def test_there_is_machine_code_for_every_capability() -> None:
    for capability in build.CAPABILITIES:
        assert (files(kernels) / f"digest.sm_{capability}.cubin").read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("capability", "images"),
    [((8, 0), [80, 0]), ((8, 9), [86, 0]), ((9, 0), [90, 0]), ((7, 0), [0]), ((7, 5), [75, 0]), ((11, 0), [0])],
)
def test_machine_code_is_chosen_by_capability(
    capability: tuple[int, int], images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = cuda_kernel.Kernel("k", {made: str(made).encode() for made in (75, 80, 86, 90)}, b"0")
    assert [int(image) for image in chosen._images(0)] == images


@pytest.mark.gpu(1)
def test_the_kernel_runs_on_this_gpu() -> None:
    assert batch.kernel_ready(torch.device("cuda", 0))


@pytest.mark.gpu(1)
def test_ptx_gives_what_machine_code_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 256, (20_000_003,), dtype=torch.uint8)
    there = {"x": tensor.cuda()}
    usual = batch.DigestBatch.of(there).compute()
    ptx = cuda_kernel.Kernel("digest", {}, (files(kernels) / "digest.ptx").read_bytes() + b"\0")
    monkeypatch.setattr(batch, "_kernel", lambda: ptx)
    assert batch.DigestBatch.of(there).compute() == usual == {"x": digest(tensor)}


@pytest.mark.gpu(1)
def test_few_blocks_many_blocks_and_torch_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        1,
        8,
        8168,
        8169,
        PIECE,
        PIECE + 1,
        5 * PIECE + 12345,
        *[70_000] * 400,
    ]
    there = {str(i): torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda") for i, n in enumerate(sizes)}
    digests = batch.DigestBatch.of(there)
    usual = digests.pieces()
    assert digests.pieces(gentle=True) == usual
    monkeypatch.setattr(batch, "kernel_ready", lambda device: False)
    assert digests.pieces() == usual


@pytest.mark.gpu(1)
def test_the_kernel_s_pieces_are_those_of_the_cpu_round_their_edges() -> None:
    memory = random_bytes(1 << 20).repeat(18)
    here = {f"{k} {by}": memory[8 * k :][: k * PIECE + by] for k in (1, 2) for by in (-8169, -9, -8, -1, 0, 1, 8, 8169)}
    there = memory.cuda()
    on_gpu = {name: there[8 * int(name[0]) :][: one.numel()] for name, one in here.items()}
    assert batch.DigestBatch.of(on_gpu).pieces() == torch_digests.compute(here)


@pytest.mark.gpu(1)
def test_the_kernel_s_pieces_of_any_size_are_those_of_the_cpu() -> None:
    """At every row of the two chunks of rows that a block of threads takes at a time, and beside it."""
    memory = random_bytes(1 << 20)
    sizes = [row * 8168 + by for row in range(1, 18) for by in (-8, 0, 8, 104)]
    there = memory.cuda()
    for piece in sizes:
        n = 3 * piece + piece // 3
        found = batch.DigestBatch.of({"x": there[:n]}, piece).pieces()
        assert found == torch_digests.compute({"x": memory[:n]}, piece=piece)


@pytest.mark.gpu(1)
def test_tensors_over_the_whole_of_an_allocation_are_told_apart() -> None:
    memory = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda")
    views = {f"{at} {n}": memory[at : at + n] for at, n in itertools.product((0, 8, 3), (8, 9, 4096, 1 << 19))}
    views["transposed"] = memory.view(1024, 1024).t()
    expected = {name: digest(view.cpu() if name != "transposed" else memory.cpu()) for name, view in views.items()}
    assert batch.DigestBatch.of(views).compute() == expected


@pytest.mark.gpu(1)
def test_a_tensor_that_was_given_other_memory_is_refused() -> None:
    tensor = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    digests = batch.DigestBatch.of({"w": tensor})
    digests.compute()
    tensor.data = torch.zeros(1000, device="cuda")
    with pytest.raises(batch.TensorMoved, match="w was given other memory"):
        digests.compute()
