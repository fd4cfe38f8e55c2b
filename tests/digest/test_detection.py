"""Digests detect every change of the bytes: each of these has gone wrong somewhere, and been called a success."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from digest_inputs import digest, digests, random_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tensorfork.digest.definition import OTHER_WIDTH, WIDTH


def as_signed(words: Sequence[int]) -> torch.Tensor:
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words], dtype=torch.int64)


ROWS = 70
COUNT = ROWS * 1024 + 300
Change = Callable[[torch.Tensor], object]


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    return random_bytes(COUNT * 8, 5).view(torch.int64)


def seen(original: torch.Tensor, change: Change) -> bool:
    """Whether a copy has another digest after the change, which must change something."""
    copy = original.clone()
    change(copy)
    assert not torch.equal(copy, original)
    return digest(copy) != digest(original)


def exchange(words: torch.Tensor, i: int, j: int) -> None:
    words[[i, j]] = words[[j, i]]


def two(below: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, below - 1), min_size=2, max_size=2, unique=True)


@settings(max_examples=60)
@given(at=st.integers(0, COUNT - 1), bit=st.integers(0, 63))
@example(at=COUNT - 1, bit=63)
def test_a_flipped_bit_is_seen(original: torch.Tensor, at: int, bit: int) -> None:
    assert seen(original, lambda words: words[at].bitwise_xor_(as_signed([1 << bit])[0]))


@settings(max_examples=60)
@given(places=two(COUNT))
def test_two_exchanged_words_are_seen(original: torch.Tensor, places: list[int]) -> None:
    assert seen(original, lambda words: exchange(words, *places))


@pytest.mark.parametrize("width", [WIDTH, OTHER_WIDTH])
@settings(max_examples=25)
@given(data=st.data())
def test_two_words_exchanged_in_one_row_or_one_column_are_seen(
    original: torch.Tensor, width: int, data: st.DataObject
) -> None:
    row, other_row = data.draw(two(ROWS))
    column, other_column = data.draw(two(width))
    assert seen(original, lambda words: exchange(words, row * width + column, row * width + other_column))
    assert seen(original, lambda words: exchange(words, row * width + column, other_row * width + column))


def four_corners(words: torch.Tensor, width: int, rows: Sequence[int], columns: Sequence[int]) -> None:
    """Opposite changes at the corners of a rectangle: every row and every column of this width adds up as before."""
    for i, j in itertools.product(range(2), range(2)):
        words[rows[i] * width + columns[j]] += (1 if i == j else -1) * 0x0123456789ABCDEF


@pytest.mark.parametrize("width", [WIDTH, OTHER_WIDTH, 2, 7, 512, 2048, 4096])
@settings(max_examples=30)
@given(data=st.data())
def test_four_exchanged_corners_are_seen(original: torch.Tensor, width: int, data: st.DataObject) -> None:
    rows, columns = data.draw(two(COUNT // width)), data.draw(two(width))
    assert seen(original, lambda words: four_corners(words, width, rows, columns))


@pytest.mark.parametrize("columns", [(0, 1023), (1, 1022), (3, 3 + OTHER_WIDTH // 2)])
@pytest.mark.parametrize("rows", [(0, 1), (0, 1023), (2, 1022), (1, 1 + OTHER_WIDTH), (1023, 1024)])
def test_four_corners_are_seen_wherever_the_widths_might_agree(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    words = torch.zeros((OTHER_WIDTH + 3) * WIDTH, dtype=torch.int64)
    assert seen(words, lambda words: four_corners(words, WIDTH, rows, columns))


@settings(max_examples=40)
@given(start=st.integers(0, COUNT * 8 - 4096), nbytes=st.sampled_from([512, 4096]))
def test_a_zeroed_page_is_seen(original: torch.Tensor, start: int, nbytes: int) -> None:
    assert seen(original, lambda words: words.view(torch.uint8)[start : start + nbytes].zero_())


@settings(max_examples=40)
@given(by=st.one_of(st.integers(1, 64), st.sampled_from([1031 * 8, 1021 * 8, 1024 * 8, 4096])))
def test_a_copy_shifted_by_some_bytes_is_seen(original: torch.Tensor, by: int) -> None:
    shifted = torch.roll(original.view(torch.uint8), by).view(torch.int64)
    assert digest(shifted) != digest(original)


@pytest.mark.parametrize("length", [1031, 1021, 1024, 4096])
def test_blocks_of_words_in_another_order_are_seen(original: torch.Tensor, length: int) -> None:
    def swap(words: torch.Tensor) -> None:
        one, other = slice(0, length), slice(7 * length, 8 * length)
        words[one], words[other] = words[other].clone(), words[one].clone()

    assert seen(original, swap)


def test_pieces_in_another_order_are_seen() -> None:
    words = random_bytes(4 * 32_768).view(4, 4096, 8)
    found = {digest(words[list(order)], 32_768) for order in itertools.permutations(range(4))}
    assert len(found) == 24


def test_exchanged_tensors_are_seen() -> None:
    one, other = torch.randn(100), torch.randn(100)
    before = digests({"a": one, "b": other})
    assert digests({"a": other, "b": one}) == {"a": before["b"], "b": before["a"]}
    assert before["a"] != before["b"]


@pytest.mark.parametrize("shape", [(64, 64), (1024, 1024), (1031, 1024)])
def test_a_transposed_copy_is_seen(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape)
    assert digest(tensor.t().contiguous()) != digest(tensor)


def test_a_constant_tensor_of_another_value_or_length_is_seen() -> None:
    constants = {f"{n} {value}": torch.full((n,), value) for n in (1, 2, 1024, 9999) for value in (1.0, 2.0, -1.0)}
    assert len(set(digests(constants).values())) == len(constants)
