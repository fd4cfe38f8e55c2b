"""A tensor is digested in pieces of 8 MiB, each with a digest of its own; the tensor's is the root over them."""

import ctypes
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from digest_inputs import DTYPES, TUNINGS, digest, over, random_bytes, tuned_as, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorfork.digest import batch, definition, torch_digests
from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.definition import PIECE, differing, pieces_of_words, root, roots
from tensorfork.digest.elements import bytes_read_once, copy_elements
from tensorfork.model.describe import describe

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

SHORT = 2 * 8168 + 48
"""Bytes of a piece in these tests: two rows and some words, as the 1027 rows of a piece are followed by some."""
ROUND = [-17, -16, -8, -1, 0, 1, 7, 8, 16, 8168]
FORMS: dict[str, Callable[[torch.Tensor, torch.dtype, int, int], torch.Tensor]] = {
    "dense": lambda memory, dtype, n, at: over(memory, dtype, at, (n,), (1,)),
    "transposed": lambda memory, dtype, n, at: over(memory, dtype, at, (3, n // 3), (1, 3)),
    "with gaps": lambda memory, dtype, n, at: over(memory, dtype, at, (n,), (2,)),
    "rows with gaps": lambda memory, dtype, n, at: over(memory, dtype, at, (5, n // 5), (n // 5 + 3, 1)),
    "expanded": lambda memory, dtype, n, at: over(memory, dtype, at, (n, 7), (1, 0)),
    "windows": lambda memory, dtype, n, at: over(memory, dtype, at, (n - 40, 41), (1, 1)),
}


def pieces(tensor: torch.Tensor, piece: int = PIECE, *, checked: bool = False) -> tuple[int, ...]:
    return torch_digests.compute({"x": tensor}, piece=piece, checked_reads=checked)["x"]


@pytest.mark.parametrize("device", TUNINGS)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(data=st.data())
def test_pieces_are_those_of_the_definition_round_every_edge(device: str, form: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    nbytes = data.draw(st.integers(1, 4)) * SHORT + data.draw(st.sampled_from(ROUND))
    at = data.draw(st.sampled_from([0, 16, 24])) if dtype.itemsize < 16 else 16
    memory = random_bytes(2 * nbytes + 16 * (at + 32), data.draw(st.integers(0, 100)))
    tensor = FORMS[form](memory, dtype, nbytes // dtype.itemsize, at + data.draw(st.sampled_from([0, dtype.itemsize])))
    with tuned_as(device):
        found = pieces(tensor, SHORT, checked=device == "cpu, checked")
    assert found == pieces_of_words(words_of(tensor), SHORT)
    assert len(found) == -(-bytes_read_once(describe({"x": tensor}).layout.tensors[0]) // SHORT)


@pytest.mark.parametrize("checked", [False, True])
def test_a_piece_has_8_mib_and_the_digest_that_it_has_as_a_tensor(checked: bool) -> None:
    assert PIECE == 1 << 23
    memory = random_bytes(65_537).repeat(260)[: 2 * PIECE + 1]
    for nbytes, count in ((PIECE - 1, 1), (PIECE, 1), (PIECE + 1, 2), (2 * PIECE, 2), (2 * PIECE + 1, 3)):
        found = pieces(memory[:nbytes], checked=checked)
        assert len(found) == count
        assert found == tuple(digest(part) for part in memory[:nbytes].split(PIECE))


def test_a_whole_piece_is_that_of_the_definition() -> None:
    memory = random_bytes(PIECE + 8).view(torch.int64)
    assert pieces(memory) == pieces_of_words([word & definition.MASK for word in memory.tolist()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_element_lies_in_two_pieces(dtype: torch.dtype) -> None:
    assert PIECE % dtype.itemsize == 0


def test_tensors_digested_together_have_the_pieces_that_they_have_by_themselves() -> None:
    memory = random_bytes(40 * SHORT)
    tensors = {f"{n} {at}": memory[at:][:n] for n in (SHORT, SHORT + 1, 3 * SHORT) for at in (0, SHORT + 8, 5 * SHORT)}
    tensors |= {f"{i}": row for i, row in enumerate(memory.view(8, -1)[:, : 2 * SHORT])}
    assert torch_digests.compute(tensors, piece=SHORT) == {
        name: pieces(one.clone(), SHORT) for name, one in tensors.items()
    }


@settings(max_examples=60)
@given(data=st.data())
def test_stretches_of_the_scratch_are_whole_rows_up_to_the_ends_of_pieces(data: st.DataObject) -> None:
    row = 16
    piece = data.draw(st.integers(3, 12)) * 8 + row
    scratch = torch.zeros(4 * row + data.draw(st.sampled_from([0, 8])), dtype=torch.uint8)
    elements = random_bytes(2 * data.draw(st.integers(1, 300))).view(torch.int16)
    parts = elements.split(data.draw(st.integers(1, scratch.numel() // 4)))
    came, at = [], 0
    for start, nbytes in copy_elements(scratch, parts, row, piece):
        assert start % 8 == 0
        assert at % row == 0
        came.append(scratch[start : start + nbytes].clone())
        at += nbytes
        assert at <= piece
        at %= piece
    assert torch.equal(torch.cat(came), elements.view(torch.uint8))


# The root.


def test_the_root_of_one_piece_is_that_piece_s_digest_and_of_none_zero() -> None:
    assert (root(()), root((7,))) == (0, 7)


def test_the_root_depends_on_every_piece_their_order_and_number() -> None:
    found = [1, 2, 3, (1 << 64) - 1]
    others = {root(order) for order in itertools.permutations(found)}
    others |= {root([*found[:i], found[i] ^ 1 << bit, *found[i + 1 :]]) for i in range(4) for bit in range(0, 64, 7)}
    others |= {root(found[:i]) for i in range(4)} | {root([*found, 0])}
    assert len(others) == 24 + 40 + 5
    assert root(found) == 0xA0FA7F7DC196B57B


def test_another_definition_gives_another_root(monkeypatch: pytest.MonkeyPatch) -> None:
    before = root((1, 2))
    monkeypatch.setattr(definition, "NAME", "sums9/1")
    assert root((1, 2)) != before


def test_pieces_that_differ_are_ranges_of_bytes() -> None:
    def ranges(ours: str, theirs: str, nbytes: int) -> list[tuple[int, int]]:
        return list(differing(list(map(ord, ours)), list(map(ord, theirs)), nbytes))

    assert ranges("abcd", "abcd", 4 * PIECE) == []
    assert ranges("abcd", "xbcd", 4 * PIECE) == [(0, PIECE)]
    assert ranges("abcd", "axyd", 4 * PIECE) == [(PIECE, 3 * PIECE)]
    assert ranges("abcd", "xbcx", 3 * PIECE + 5) == [(0, PIECE), (3 * PIECE, 3 * PIECE + 5)]
    assert ranges("abcd", "wxyz", 3 * PIECE + 5) == [(0, 3 * PIECE + 5)]


# The kernel's table, without a kernel.


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the kernel, the definition over what its table names."""

    def run(device: torch.device, table: Sequence[int], gentle: bool) -> list[int]:
        entries = list(zip(table[::2], table[1::2], strict=True))
        raw = [ctypes.string_at(address, nbytes) + bytes(-nbytes % 8) for address, nbytes in entries]
        words = [[int.from_bytes(one[i : i + 8], "little") for i in range(0, len(one), 8)] for one in raw]
        return [pieces_of_words(one)[0] for one in words]

    monkeypatch.setattr(batch, "_for_kernel", lambda tensor: tensor.is_contiguous() and tensor.numel() > 0)
    monkeypatch.setattr(batch, "kernel_ready", lambda device: True)
    monkeypatch.setattr(batch, "_run_kernel", run)


@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_given_each_piece_and_every_tensor_gets_its_own() -> None:
    memory = random_bytes(4 * SHORT + 16)
    tensors = {str(n): memory[:n] for n in (1, SHORT - 1, SHORT, SHORT + 1, 4 * SHORT + 13)}
    tensors |= {"tied": tensors["1"], "empty": memory[:0], "gapped": memory[::2], "last": memory[8:]}
    found = DigestBatch.of(tensors, SHORT).pieces()
    assert found == {name: pieces(one, SHORT) for name, one in tensors.items()}
    assert DigestBatch.of(tensors, SHORT).compute() == roots(found)
