"""What a mismatch says where names differ by wrappers: the `rename=` that makes them equal, and few lines."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tensorfork import LayoutMismatch, ModelLayout, StorageLayout, TensorLayout
from tensorfork.fork import suggested_rename
from tensorfork.fork.match import match
from tensorfork.fork.rename import namer

LAYERS = [f"layers.{i}.{kind}.{what}" for i in range(12) for kind in ("attn.q", "mlp", "norm") for what in ("w", "b")]
NAMES = ["embed.w", *LAYERS, "head.w"]


def wrapped(part: str, *under: str) -> list[str]:
    """The names with this part in those that lie under one of these."""

    def name(one: str) -> str:
        at = next((match.end() for place in under if (match := re.match(place, one))), None)
        return one if at is None else f"{one[:at]}{part}.{one[at:]}"

    return [name(one) for one in NAMES]


def before(part: str) -> list[str]:
    return [f"{part}.{name}" for name in NAMES]


def of(names: Sequence[str], shape: Sequence[int] = (2,)) -> ModelLayout:
    tensors = (TensorLayout(name, "float32", tuple(shape), (1,), i, 0) for i, name in enumerate(names))
    return ModelLayout(tuple(tensors), (StorageLayout(4 * shape[0], "cpu"),) * len(names))


def mismatch(theirs: Sequence[str], ours: Sequence[str]) -> LayoutMismatch:
    with pytest.raises(LayoutMismatch) as raised:
        match(of(theirs), of(ours))
    return raised.value


def suggestion(error: LayoutMismatch) -> str | None:
    found = re.search(r"give rename=(.*) to fork_into", str(error).splitlines()[0])
    return None if found is None else found[1]


LAYER = r"layers\.\d+\."
CASES = {
    "around everything": (before("_orig_mod"), "{'_orig_mod.': ''}", "{'': '_orig_mod.'}"),
    "an unknown one": (before("language_model"), "{'language_model.': ''}", "{'': 'language_model.'}"),
    "several parts": (before("a.b.c"), "{'a.b.c.': ''}", "{'': 'a.b.c.'}"),
    "a part that names have already": (before("layers"), "{'layers.': ''}", "{'': 'layers.'}"),
    "around each layer": (
        wrapped("_orig_mod", LAYER),
        "{'layers.*._orig_mod.': 'layers.*.'}",
        "{'layers.*.': 'layers.*._orig_mod.'}",
    ),
    "around part of each layer": (
        wrapped("inner", r"layers\.\d+\.attn\."),
        "{'layers.*.attn.inner.': 'layers.*.attn.'}",
        "{'layers.*.attn.': 'layers.*.attn.inner.'}",
    ),
    "around all parts of each layer": (
        wrapped("_checkpoint_wrapped_module", r"layers\.\d+\.\w+\."),
        "lambda name: name.replace('_checkpoint_wrapped_module.', '')",
        "{'layers.*.attn.': 'layers.*.attn._checkpoint_wrapped_module.', "
        "'layers.*.mlp.': 'layers.*.mlp._checkpoint_wrapped_module.', "
        "'layers.*.norm.': 'layers.*.norm._checkpoint_wrapped_module.'}",
    ),
    "around one layer": (
        wrapped("_orig_mod", r"layers\.7\."),
        "{'layers.*._orig_mod.': 'layers.*.'}",
        "{'layers.7.': 'layers.7._orig_mod.'}",
    ),
    "around everything and each layer": (
        [f"_fsdp_wrapped_module.{name}" for name in wrapped("_fsdp_wrapped_module", LAYER)],
        "{'_fsdp_wrapped_module.': '', '_fsdp_wrapped_module.layers.*._fsdp_wrapped_module.': 'layers.*.'}",
        "{'': '_fsdp_wrapped_module.', 'layers.*.': '_fsdp_wrapped_module.layers.*._fsdp_wrapped_module.'}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names_that_differ_by_a_wrapper_are_said_to_in_one_line(case: str) -> None:
    others, here, there = CASES[case]
    for theirs, ours, expected in ((NAMES, others, here), (others, NAMES, there)):
        error = mismatch(theirs, ours)
        assert suggestion(error) == expected
        assert "\n" not in str(error)
        assert "No other difference was found; nothing was copied" in str(error)
        rename = namer(eval(suggestion(error) or "None"))
        renamed = {name: rename(name) for name in ours}
        assert len(match(of(theirs), of(ours), renamed)) == len(ours)
        assert error.missing == tuple(name for name in ours if name not in theirs)
        assert error.unexpected == tuple(name for name in theirs if name not in ours)
        assert error.renamed == {name: renamed[name] for name in error.missing}


def test_wrappers_of_both_sides_are_bridged() -> None:
    error = mismatch(wrapped("_orig_mod", LAYER), before("_fsdp_wrapped_module"))
    rename = namer(eval(suggestion(error) or "None"))
    assert [rename(name) for name in before("_fsdp_wrapped_module")] == wrapped("_orig_mod", LAYER)


def test_what_takes_the_place_of_another_beginning_is_suggested_with_doubt() -> None:
    error = mismatch(before("transformer"), before("model"))
    assert suggestion(error) == "{'model.': 'transformer.'}"
    assert "to fork_into, if these are the same." in str(error)


def test_other_differences_stand_below() -> None:
    error = mismatch([*before("module"), "module.extra.w"], [*NAMES, "lacking.w"])
    lines = str(error).splitlines()
    assert suggestion(error) == "{'': 'module.'}"
    assert "74 names differ only by the wrapper 'module.' in the seed's" in lines[0]
    assert "There are 2 other differences" in lines[0]
    assert lines[1:] == ["  missing from the seed: lacking.w", "  only in the seed: module.extra.w"]


def test_names_that_are_equal_already_are_not_renamed_by_what_is_suggested() -> None:
    theirs, ours = [*before("module"), "bias", "layers.0.c"], [*NAMES, "bias", "layers.0.c"]
    error = mismatch(theirs, ours)
    assert suggestion(error) == "{'': 'module.', 'bias': 'bias', 'layers.*.c': 'layers.*.c'}"
    assert sorted(map(namer(eval(suggestion(error) or "")), ours)) == sorted(theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["l.0.k_norm.w"], ["l.0.q_norm.w"]),
        (["l.0.k_norm.w", "l.0.v.w"], ["l.0.q_norm.w", "l.0.o.w"]),
        (["encoder.w", "encoder.b", "x"], ["decoder.w", "y"]),
        (["a.qweight"], ["a.weight"]),
        (["l.0.a.w", "l.0.b.w"], ["l.0.w"]),
        (["l.0.w"], ["l.1.w"]),
        (["encoder.a.w", "encoder.b.w"], ["decoder.a.w", "decoder.b.w"]),
    ],
)
def test_one_module_is_not_taken_for_another(theirs: list[str], ours: list[str]) -> None:
    error = mismatch(["same", *theirs], ["same", *ours])
    assert suggestion(error) is None
    assert error.renamed == {}


def test_tensors_of_other_shapes_are_not_said_to_differ_by_name_alone() -> None:
    with pytest.raises(LayoutMismatch) as raised:
        match(of(NAMES), of(before("module"), (3,)))
    assert suggestion(raised.value) is None


def many(of_each: Callable[[int], str]) -> list[str]:
    return [of_each(i) for i in range(20_000)]


@pytest.mark.parametrize(
    ("theirs", "ours", "listed"),
    [
        (lambda i: f"a.{i}.w", lambda i: f"b{i}.x.v", 40),
        (lambda i: f"l.{i}.w", lambda i: f"_orig_mod.l.{i}.w", 0),
        (lambda i: f"l.{i}.{'n' * 4000}", lambda i: f"l.{i}.{'m' * 4000}", 40),
    ],
    ids=["nothing alike", "a wrapper", "long names"],
)
def test_the_message_is_bounded_and_the_attributes_have_all(theirs: Any, ours: Any, listed: int) -> None:
    error = mismatch(many(theirs), many(ours))
    lines = str(error).splitlines()
    assert len(str(error)) < 30_000
    assert len(lines) == 1 + listed + 2 * bool(listed)
    assert not listed or lines[21] == "  ... and 19,980 more of these"
    assert len(error.missing) == len(error.unexpected) == 20_000


def test_differing_tensors_are_counted_too() -> None:
    with pytest.raises(LayoutMismatch) as raised:
        match(of(NAMES), of(NAMES, (3,)))
    assert len(raised.value.mismatched) == len(NAMES)
    assert str(raised.value).endswith("... and 54 more of these")


def test_nothing_is_suggested_for_more_names_than_can_be_compared_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggested_rename, "MAX_NAMES", 100)
    assert suggestion(mismatch(NAMES, before("module"))) is None
