"""The root over all digests of a model: its content."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorfork.digest import content
from tensorfork.digest.content import content_root

DIGESTS = st.dictionaries(st.text(max_size=8), st.integers(0, (1 << 64) - 1), max_size=8)


def test_the_root_is_the_one_it_always_was() -> None:
    """It travels with versions, from one release of tensorfork to another: it changes only with `definition.NAME`."""
    assert content_root({}).hex() == "be4bc934f367301e1fe0208976773046"
    digests = {"model.weight": 1, "model.bias": (1 << 64) - 1, "ü": 0}
    assert content_root(digests).hex() == "37fde67ed5286e591c6e4ab8fb6b36ec"


@given(DIGESTS, st.randoms(use_true_random=False))
def test_the_order_of_the_tensors_does_not_matter(digests: dict[str, int], draw: random.Random) -> None:
    shuffled = list(digests.items())
    draw.shuffle(shuffled)
    assert content_root(dict(shuffled)) == content_root(digests)


@given(DIGESTS, DIGESTS)
def test_other_names_or_digests_have_another_root(one: dict[str, int], other: dict[str, int]) -> None:
    assert (content_root(one) == content_root(other)) == (one == other)


@given(DIGESTS.filter(bool), st.data())
def test_one_digest_or_name_that_differs_gives_another_root(digests: dict[str, int], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(digests)))
    root = content_root(digests)
    assert content_root(digests | {name: digests[name] ^ 1 << data.draw(st.integers(0, 63))}) != root
    rest = {key: value for key, value in digests.items() if key != name}
    assert content_root(rest) != root
    assert content_root(rest | {name + "x": digests[name]}) != root or name + "x" in rest


def test_two_tensors_that_exchange_their_digests_give_another_root() -> None:
    assert content_root({"a": 1, "b": 2}) != content_root({"a": 2, "b": 1})


def test_names_do_not_run_into_one_another() -> None:
    assert content_root({"ab": 1}) != content_root({"a": int.from_bytes(b"b", "little")})
    first = {"a": int.from_bytes(b"\x01\x00\x00\x00b\x02\x02\x02", "little")}
    assert content_root(first) != content_root(first | {"b": 1})


def test_a_name_that_is_not_unicode_has_a_root() -> None:
    assert content_root({"\udc80": 1}) != content_root({"?": 1})


def test_another_definition_of_the_digest_gives_another_root(monkeypatch: pytest.MonkeyPatch) -> None:
    root = content_root({"a": 1})
    monkeypatch.setattr(content, "NAME", "sums9/1")
    assert content_root({"a": 1}) != root
