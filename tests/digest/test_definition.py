"""The digest is what its definition says, for every kind of tensor, and takes little of the machine."""

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from digest_inputs import DTYPES, TUNINGS, digest, digest_of_words, digests, over, random_bytes, tuned_as, words_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tensorfork.digest import definition, torch_digests
from tensorfork.interpreter.openmp import single_threaded

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

MASK = (1 << 64) - 1
EDGES = [0, 1, 2, 7, 8, 1020, 1021, 1022, 1024, 1030, 1031, 1032, 2042, 2061, 2062, 3093, 8192, 31650, 31651, 31652]


# What the definition says.


@pytest.mark.parametrize("device", TUNINGS)
@settings(max_examples=40)
@given(count=st.one_of(st.sampled_from(EDGES), st.integers(0, 40_000)), seed=st.integers(0, 1000), at=st.integers(0, 9))
def test_words_have_the_digest_of_the_definition_in_words_and_code(device: str, count: int, seed: int, at: int) -> None:
    memory = random_bytes(8 * (count + at), seed).view(torch.int64)
    with tuned_as(device):
        assert digest(memory[at:]) == digest_of_words([word & MASK for word in memory[at:].tolist()])


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, shape, stride (gaps, overlaps, permutations) and place, over random bytes."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    stride = [draw(st.integers(0, 40)) for _ in shape]
    if draw(st.booleans()):  # dense, permuted
        order = draw(st.permutations(range(len(shape))))
        step = 1
        for i in order:
            stride[i], step = step, step * max(shape[i], 1)
    start = draw(st.integers(0, 20)) * dtype.itemsize
    extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    memory = random_bytes(start + max(extent, 1) * dtype.itemsize + 3, draw(st.integers(0, 1000)))
    made: torch.Tensor = over(memory, dtype, start, shape, stride)
    return made


@pytest.mark.parametrize("device", TUNINGS)
@settings(max_examples=100)
@given(tensor=strided())
def test_any_dtype_shape_stride_and_place_has_the_digest_of_its_elements(device: str, tensor: torch.Tensor) -> None:
    with tuned_as(device):
        assert digest(tensor) == digest_of_words(words_of(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_torch_has_is_read_bit_for_bit_even_with_gaps(dtype: torch.dtype) -> None:
    memory = random_bytes(4096)
    dense, gapped = over(memory, dtype, 16, (5, 7), (7, 1)), over(memory, dtype, 16, (5, 7), (15, 2))
    for tensor in (dense, gapped):
        assert digest(tensor) == digest_of_words(words_of(tensor))


@pytest.mark.parametrize("device", TUNINGS)
@pytest.mark.parametrize("at", [1, 4, 8])
@pytest.mark.parametrize("nbytes", [25, 5_000, 300_003])
def test_memory_that_begins_at_any_byte_has_the_digest_of_its_bytes(device: str, at: int, nbytes: int) -> None:
    memory = random_bytes(nbytes + 16)
    loose = torch.frombuffer(bytearray(memory.numpy(force=True).tobytes()), dtype=torch.uint8, offset=at)
    want = digest_of_words(words_of(memory[at : at + nbytes].clone()))
    aligned = -loose.data_ptr() % 8  # in a storage that is not
    with tuned_as(device):
        assert digest(memory[at : at + nbytes]) == want
        assert digest(loose[:nbytes]) == want
        assert digest(loose[aligned:][: nbytes - 8]) == digest(loose[aligned:][: nbytes - 8].clone())


@pytest.mark.parametrize("device", TUNINGS)
@settings(max_examples=12)
@given(data=st.data())
def test_tensors_digested_together_have_the_digests_that_they_have_by_themselves(
    device: str, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.sampled_from([*EDGES, 100, 5000, 16385, 40_000]), min_size=1, max_size=4))
    memory = random_bytes(1 << 20, data.draw(st.integers(0, 1000)))
    tensors = {}
    for i in range(data.draw(st.integers(1, 30))):
        nbytes = data.draw(st.sampled_from(lengths)) * data.draw(st.sampled_from([1, 8]))
        start = data.draw(st.integers(0, (1 << 20) - nbytes))
        tensors[str(i)] = memory[start - start % data.draw(st.sampled_from([1, 8])) :][:nbytes]
        if data.draw(st.booleans()):
            tensors[f"{i} apart"] = tensors[str(i)].clone()
    with tuned_as(device):
        assert digests(tensors) == {name: digest(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("device", TUNINGS)
@pytest.mark.parametrize(
    "gaps", [[200_000] * 8, [131_081] * 8, [200_004] * 8, [200_000, 160_000, 160_000, 200_008] * 2]
)
def test_neighbours_in_one_storage_have_the_digests_that_they_have_by_themselves(device: str, gaps: list[int]) -> None:
    memory = random_bytes(9 * 200_000)
    tensors = {str(at): memory[at:][:131_081] for at in itertools.accumulate(gaps, initial=0)}
    tensors |= {f"{at} apart": tensor.clone() for at, tensor in tensors.items()}
    tensors["another dtype"] = memory[:131_081].view(torch.int8)
    with tuned_as(device):
        assert digests(tensors) == {name: digest(tensor.clone()) for name, tensor in tensors.items()}


def test_the_halves_of_wide_elements_stay_together_in_expanded_tensors() -> None:
    tensor = random_bytes(64).view(torch.complex128)[:2].view(2, 1).expand(2, 5)
    assert digest(tensor) == digest_of_words(words_of(tensor))


REPEATED = {
    "one element": lambda memory: memory[:1].expand(100_000, 20_000),
    "rows": lambda memory: memory.view(-1, 40).unsqueeze(1).expand(-1, 1 << 30, -1),
    "columns with gaps": lambda memory: memory.view(-1, 4)[:, :3].unsqueeze(2).expand(-1, -1, 1 << 30),
    "sliding windows": lambda memory: memory.as_strided((30_000, 10_000), (1, 1)),
    "windows of windows": lambda memory: memory.as_strided((500, 600, 10_000), (20, 1, 1)),
    "windows with gaps": lambda memory: memory.as_strided((1000, 1 << 4, 2000), (8, 2, 2)),
}
"""Of 40,000 elements, billions or millions of which are read once: element by element they would take minutes."""


@pytest.mark.parametrize("device", TUNINGS)
@pytest.mark.parametrize("form", REPEATED)
def test_elements_that_a_tensor_repeats_are_read_once(device: str, form: str) -> None:
    memory = random_bytes(80_000).view(torch.int16)
    tensor = REPEATED[form](memory)
    reached = {
        "one element": memory[:1],
        "rows": memory,
        "columns with gaps": memory.view(-1, 4)[:, :3],
        "sliding windows": memory[:39_999],
        "windows of windows": memory[: 499 * 20 + 599 + 10_000],
        "windows with gaps": memory[: 999 * 8 + 15 * 2 + 2 * 2000 : 2],
    }[form]
    with tuned_as(device):
        checked = device == "cpu, checked"
        assert digests({"x": tensor}, checked_reads=checked)["x"] == digest_of_words(words_of(reached))


@pytest.mark.parametrize("device", TUNINGS)
@pytest.mark.parametrize("form", ["dense", "misaligned", "gapped", "odd length"])
def test_a_tensor_of_several_pieces_has_the_digest_of_the_definition(device: str, form: str) -> None:
    memory = random_bytes(5 * 32_768 + 16)
    with tuned_as(device):
        tensor = {
            "dense": memory[: 5 * 32_768],
            "misaligned": memory[3:-8],
            "gapped": memory.view(-1, 2)[:, 1],
            "odd length": memory[: 4 * 32_768 + 13],
        }[form]
        assert digest(tensor, 32_768) == digest_of_words(words_of(tensor), 32_768)


KNOWN: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
    "one word": (lambda: torch.tensor([1]), 0xA6D1BA569FD25C13),
    "less than a row": (lambda: torch.arange(700, dtype=torch.int32), 0x3C9BCA2FBC20EF7C),
    "rows and columns": (lambda: torch.arange(1, 30_000), 0xBEC0B15AD023578),
    "an odd number of bytes": (lambda: torch.arange(5001).to(torch.uint8), 0x5EC2C8CFAABDB341),
    "with gaps, transposed": (
        lambda: torch.arange(60_000, dtype=torch.int16).view(200, 300)[:, ::2].t(),
        0x8CEF09F2A5DA3825,
    ),
    "three pieces": (lambda: torch.arange((1 << 21) + 5000), 0xD433173F8CE07B92),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_definition_is_the_one_it_always_was(name: str) -> None:
    """Versions of tensorfork with one name for it compute the same: change `definition.NAME` with a value here."""
    make, want = KNOWN[name]
    assert (definition.NAME, hex(digest(make()))) == ("sums4/1", hex(want))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5, 2)])
def test_a_tensor_without_elements_has_the_digest_zero(shape: tuple[int, ...]) -> None:
    assert digest(torch.empty(shape)) == 0


def test_ties_are_computed_once_and_named_each() -> None:
    tensor = torch.arange(5000.0)
    tied = {"a": tensor, "b": tensor, "c": tensor.view(5000)}
    calls: list[int] = []
    with watched(lambda function, tensors: calls.append(1)):
        digests({"a": tensor})
    once = len(calls)
    with watched(lambda function, tensors: calls.append(1)):
        found = digests(tied)
    assert len(calls) == 2 * once
    assert found["a"] == found["b"] == found["c"] == digest(tensor.clone())


def test_gaps_between_elements_do_not_count() -> None:
    memory = random_bytes(8192).view(64, 128)
    before = digest(memory[:, :100])
    memory[:, 100:] ^= 255
    assert digest(memory[:, :100]) == before


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.device("meta")],
    ids=["no grad", "enable grad", "inference mode", "meta device"],
)
def test_the_callers_modes_do_not_matter(mode: Callable[[], Any]) -> None:
    made = {"p": torch.nn.Parameter(torch.randn(9, 9)), "q": torch.randn(70_000), "r": torch.randn(9, 9)[:, ::2]}
    want = digests(made)
    with mode():
        assert digests(made) == want


def test_once_cancelled_it_stops_between_two_groups_and_returns_nothing() -> None:
    tensors = {str(length): torch.ones(length) for length in range(1, 50)}
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == 3

    assert digests(tensors, cancelled) == {}
    assert len(asked) == 3


# What it costs.


class _Watch(TorchDispatchMode):
    def __init__(self, see: Callable[[Any, list[torch.Tensor]], object]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = [*args, *(kwargs or {}).values(), *(result if isinstance(result, list | tuple) else [result])]
        flat += [one for some in flat if isinstance(some, list | tuple) for one in some]
        self._see(func, [one for one in flat if isinstance(one, torch.Tensor)])
        return result


def watched(see: Callable[[Any, list[torch.Tensor]], object]) -> _Watch:
    """Calls `see` with every operation of torch, and the tensors it takes and gives."""
    return _Watch(see)


def all_sorts() -> dict[str, torch.Tensor]:
    """Tensors that take every way through the code."""
    sizes = (64, 1021, 1022, 5000, 31_744, 31_745, 300_000, 6_000_000)
    made = {f"{size} words": torch.ones(size, dtype=torch.int64) for size in sizes}
    made |= {f"{i} of many": torch.ones(777) for i in range(300)}
    made |= {f"{i} of spaced": row for i, row in enumerate(torch.ones(7, 40_000, dtype=torch.int64))}
    made |= {"misaligned": torch.ones(3_000_001, dtype=torch.uint8)[1:]}
    made |= {f"{dtype} gapped": torch.ones(500, 2000, dtype=dtype)[:, ::2] for dtype in (torch.uint8, torch.float64)}
    return made | {
        "rows": torch.ones(300, 70_000, dtype=torch.uint8)[:, :-1],
        "expanded": torch.ones(5).expand(9999, 5),
    }


@pytest.mark.parametrize("checked_reads", [False, True])
@pytest.mark.parametrize("single", [True, False])
def test_no_operation_on_the_cpu_wakes_torch_s_other_threads(
    single: bool, checked_reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of torch's, woken beside an engine's, were seen to make both wait for seconds. They are not woken where
    torch uses one thread for ours, nor by an operation on less than 32,768 elements.
    """
    if not single:
        monkeypatch.setattr(torch_digests, "single_threaded", lambda: contextlib.nullcontext(False))
    before = torch.get_num_threads()
    threads: set[int] = set()
    free = ("aten::empty", "aten::set_")
    largest = 0

    def see(function: Any, tensors: list[torch.Tensor]) -> None:
        nonlocal largest
        if not function.is_view and not function.name().startswith(free):
            largest = max(largest, *(tensor.numel() for tensor in tensors), 0)
            threads.add(torch.get_num_threads())

    tensors = all_sorts()
    with watched(see):
        digests(tensors, checked_reads=checked_reads)
    assert threads == {1} if single else 30_000 < largest < 32_768
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("device", TUNINGS)
def test_scratch_is_at_most_16_mib_whatever_the_model(device: str) -> None:
    tensors = all_sorts()
    known = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    live: dict[int, tuple[StorageWeakRef, int]] = {}
    most = 0

    def see(function: Any, seen: list[torch.Tensor]) -> None:
        nonlocal most
        for storage in [tensor.untyped_storage() for tensor in seen]:
            if storage._cdata not in known and storage.device.type != "meta":
                live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        for gone in [key for key, (alive, _) in live.items() if alive.expired()]:
            del live[gone]
        most = max(most, sum(nbytes for _, nbytes in live.values()))

    with tuned_as(device), watched(see):
        digests(tensors)
    assert 0 < most <= 16 << 20


@pytest.mark.parametrize(("count", "nbytes"), [(64, 128 << 10), (128, 64 << 10), (33, 128 << 10), (500, 9000)])
def test_tensors_that_are_summed_together_are_each_summed_whole(count: int, nbytes: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = {str(i): torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator) for i in range(count)}
    expected = {name: digest(tensor) for name, tensor in tensors.items()}
    with tuned_as("cuda"):
        assert digests(tensors) == expected


def test_single_threaded_changes_torch_s_threads_for_the_calling_thread_alone_and_while_it_lasts() -> None:
    usual, seen = torch.get_num_threads(), list[int]()
    with single_threaded() as kept:
        assert kept == (torch.get_num_threads() == 1)
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [usual]
    assert torch.get_num_threads() == usual
