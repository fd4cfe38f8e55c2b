"""What a fork says and does about plain values that are not the seed's."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from structures import Plain, Slotted, module
from torch import nn

import tensorfork
from tensorfork.fork import verification
from tensorfork.seed.values import PackedValues, PublishedValues
from tensorfork.wire.pages import pack_pages
from tensorfork.wire.tables import pack_values

Publish = Callable[[Any], tensorfork.Seed]
TIMEOUT = 20.0


class Attention(nn.Module):
    """As vLLM keeps it: a scale as a buffer, and the same number beside it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("k_scale", torch.tensor(scale))
        self.k_scale_float = scale
        self.backend = "flash"


def model(scale: float, layers: int = 2) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Attention(scale) for _ in range(layers))})


def forms(scale: float) -> dict[str, Callable[[], nn.Module]]:
    return {"in place": lambda: model(scale), "meta": lambda: model(scale).to("meta")}


FORMS = pytest.mark.parametrize("form", ["in place", "meta"])


def fork_into(into: Any, seed: tensorfork.Seed, **more: Any) -> tensorfork.ForkReport:
    return tensorfork.fork_into(into, seed.address, timeout=TIMEOUT, device="cpu", **more)


def untouched(into: nn.Module, scale: float) -> bool:
    return all(
        layer.k_scale_float == scale and (layer.k_scale.is_meta or layer.k_scale.item() == torch.tensor(scale).item())
        for layer in into["layers"]
    )


def different(report: tensorfork.ForkReport) -> dict[str, tuple[int, str, str]]:
    assert report.values is not None
    return {one.attribute: (len(one.names), one.seed, one.here) for one in report.values.different}


@FORMS
def test_what_differs_is_in_the_report_by_attribute_and_is_logged_once(
    seed_of: Publish, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    into = forms(1.0)[form]()
    report = fork_into(into, seed_of(model(0.02)))
    assert different(report) == {"k_scale_float": (2, "0.02", "1.0")}
    assert "plain values differ: 2 k_scale_float" in str(report)
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert record.name == "tensorfork"
    said = "k_scale_float: 2 values, such as layers.0.k_scale_float: 0.02 in the seed, 1.0 here"
    assert said in record.getMessage()
    assert report.verified
    assert [layer.k_scale_float for layer in into["layers"]] == [1.0, 1.0], "it is reported, and not changed"


@FORMS
def test_equal_models_differ_in_nothing(seed_of: Publish, caplog: pytest.LogCaptureFixture, form: str) -> None:
    report = fork_into(forms(0.02)[form](), seed_of(model(0.02)))
    assert report.values is not None
    assert (report.values.compared, report.values.different, report.values.opaque) == (11, (), ())
    assert str(report.values) == "none of 11 plain values differs from the seed's unexpectedly"
    assert "values" not in report.not_compared
    assert not caplog.records


@FORMS
def test_strict_is_an_error_before_a_byte_moves(seed_of: Publish, form: str) -> None:
    into = forms(1.0)[form]()
    with pytest.raises(tensorfork.ValueMismatch, match="k_scale_float: 2 values") as caught:
        fork_into(into, seed_of(model(0.02)), values="strict")
    assert caught.value.names == ("layers.0.k_scale_float", "layers.1.k_scale_float")
    assert untouched(into, 1.0)
    assert not fork_into(model(0.02), seed_of(model(0.02)), values="strict").values.different


def test_ignored_values_are_neither_asked_for_nor_compared(
    seed_of: Publish, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(self: PublishedValues) -> None:
        raise AssertionError("the seed was asked for values")

    monkeypatch.setattr(PublishedValues, "packed", asked)
    report = fork_into(model(1.0), seed_of(model(0.02)), values="ignore")
    assert report.values is None
    assert report.not_compared == ("identity", "rank", "values")
    assert not caplog.records
    tensorfork.fork(seed_of(model(0.02)).address, timeout=TIMEOUT)


def test_of_a_mapping_nothing_is_compared_and_the_report_says_so_where_we_have_values(seed_of: Publish) -> None:
    tensors = dict(model(0.02).named_buffers())
    for into, seed in ((model(1.0), tensors), (dict(model(1.0).named_buffers()), model(0.02))):
        report = fork_into(into, seed_of(seed))
        assert report.values is None
        assert ("values" in report.not_compared) == isinstance(into, nn.Module)


def test_what_only_one_side_has_differs_too_and_texts_are_not_shown(
    seed_of: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    there, here = model(0.02, 1), model(0.02, 1)
    there.only_there, here.only_here, there.token, here.token = 1, 2, "secret", "other secret"
    there.text, here.number, there.number, there.act, here.act = "x", "y", 5, nn.GELU(), nn.ReLU()
    report = fork_into(here, seed_of(there))
    found = different(report)
    assert found["only_there"] == (1, "1", "none")
    assert found["only_here"] == (1, "none", "2")
    assert found["token"] == (1, "another", "a text of 12")
    assert found["text"] == (1, "one", "none")
    assert found["number"] == (1, "5", "a text of 1")
    assert found["act"] == (1, "another", "ReLU")
    assert "secret" not in caplog.text


def test_integers_of_thousands_of_digits_are_compared_and_differ_in_words(seed_of: Publish) -> None:
    huge = 1 << 20_000
    seed = seed_of(module(weight=torch.ones(1), of_ours=1, number=huge, table={huge: 1}))
    report = fork_into(module(weight=torch.ones(1), of_ours=huge, number=huge, table={huge: 1}), seed)
    assert different(report) == {"of_ours": (1, "1", "an integer of 20,001 bits")}


def test_types_count_and_nan_is_nan(seed_of: Publish) -> None:
    there, here = Plain(one=1, nan=float("nan"), zero=0.0), Plain(one=True, nan=float("nan"), zero=-0.0)
    models = [nn.ModuleDict(), nn.ModuleDict()]
    models[0].it, models[1].it = there, here
    assert set(different(fork_into(models[1], seed_of(models[0])))) == {"one", "zero"}


def test_patterns_say_what_may_differ(seed_of: Publish) -> None:
    into, seed = model(1.0), seed_of(model(0.02))
    policy = tensorfork.ValuePolicy(differ="strict", expected="*.k_scale_float")
    report = fork_into(into, seed, values=policy)
    assert report.values is not None
    assert (report.values.different, report.values.expected) == ((), 2)
    into.eval()
    assert fork_into(into, seed, values=policy).values.expected == 2 + 4, "training may differ by itself"


@FORMS
def test_values_are_taken_over_in_the_last_step(seed_of: Publish, form: str) -> None:
    there, here = forms(0.02)["in place"](), forms(1.0)[form]()
    for one, flag in ((there, True), (here, False)):
        one.flag, one.table, one.slotted, one.nested = flag, {"a": 0.5 + flag}, Slotted(2 + flag), [Plain(x=1j * flag)]
        one["layers"][0].k_scale.note = flag
    policy = tensorfork.ValuePolicy(take=["*.k_scale_float", "flag", "table", "slotted", "nested", "*.note"])
    report = fork_into(here, seed_of(there), values=policy)
    assert [layer.k_scale_float for layer in here["layers"]] == [0.02, 0.02]
    assert (here.flag, here.table, here.slotted.scale, here.nested[0].x) == (True, {"a": 1.5}, 3, 1j)
    assert here["layers"][0].k_scale.note is True
    assert here["layers"][0].k_scale.item() == torch.tensor(0.02).item()
    assert report.values is not None
    assert (len(report.values.taken), report.values.different) == (7, ())
    assert "7 plain values taken" in str(report)


@dataclass(frozen=True)
class Settings:
    eps: float


@FORMS
def test_what_cannot_be_taken_over_is_an_error_that_names_all_before_a_byte_moves(seed_of: Publish, form: str) -> None:
    def with_values(made: nn.Module, x: float, **more: Any) -> nn.Module:
        made.pair, made.settings, made.act, made.text = (x, 1), Settings(x), (lambda: x), f"{x}"
        made.__dict__.update(more)
        return made

    here = with_values(forms(1.0)[form](), 1.0, only_here=1)
    there = seed_of(with_values(model(0.02), 2.0, only_there=1))
    policy = tensorfork.ValuePolicy(take="*")
    with pytest.raises(tensorfork.ValueMismatch) as caught:
        fork_into(here, there, values=policy)
    assert set(caught.value.names) == {
        "pair[0]",
        "settings.eps",
        "act.__closure__.x",
        "text",
        "only_here",
        "only_there",
    }
    for said in (
        "a tuple cannot be written",
        "Settings is frozen",
        "a function",
        "only numbers and bools",
        "none here",
    ):
        assert said in str(caught.value)
    assert untouched(here, 1.0)


@FORMS
def test_nothing_is_taken_over_by_a_fork_that_fails(
    seed_of: Publish, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def wrong(*_: Any) -> Any:
        raise tensorfork.VerificationFailed("a wrong byte", tensors=[])

    monkeypatch.setattr(verification, "compare_digests", wrong)
    into = forms(1.0)[form]()
    with pytest.raises(tensorfork.VerificationFailed):
        fork_into(into, seed_of(model(0.02)), values=tensorfork.ValuePolicy(take="*.k_scale_float"))
    assert [layer.k_scale_float for layer in into["layers"]] == [1.0, 1.0]


def test_where_no_thread_can_be_started_values_are_compared_all_the_same(
    seed_of: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "tensorfork-values":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert different(fork_into(model(1.0), seed_of(model(0.02)))) == {"k_scale_float": (2, "0.02", "1.0")}


def test_what_is_not_selected_is_not_compared(seed_of: Publish) -> None:
    with tensorfork.publish(model(0.02), exclude="layers.1") as seed:
        assert different(fork_into(model(1.0), seed, exclude="layers.1"))["k_scale_float"][0] == 1
    assert not different(fork_into(model(1.0), seed_of(model(0.02)), include="layers.0.k_scale"))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module, self.own = inner, 3


@FORMS
def test_values_are_renamed_as_tensors_are_and_those_of_a_wrapper_alone_do_not_count(
    seed_of: Publish, form: str
) -> None:
    into = Wrapper(forms(1.0)[form]())
    report = fork_into(into, seed_of(model(0.02)), rename={"module.": ""})
    assert report.values is not None
    (only,) = report.values.different
    assert only.names == ("module.layers.0.k_scale_float", "module.layers.1.k_scale_float")
    policy = tensorfork.ValuePolicy("strict", take="module.layers.*.k_scale_float")
    fork_into(into, seed_of(model(0.02)), rename={"module.": ""}, values=policy)
    assert [layer.k_scale_float for layer in into.module["layers"]] == [0.02, 0.02]


def test_a_rename_that_knows_tensors_alone_compares_no_values(seed_of: Publish) -> None:
    names = {"module.layers.0.k_scale": "layers.0.k_scale"}
    report = fork_into(Wrapper(model(1.0, 1)), seed_of(model(0.02, 1)), rename=names.__getitem__)
    assert report.values is not None
    assert report.values.different == ()


def test_bad_policies_are_refused() -> None:
    for wrong in ("stict", "", 3):
        with pytest.raises(ValueError, match="values must be"):
            tensorfork.fork_into(model(1.0), "tcp://127.0.0.1:1", values=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="patterns"):
        tensorfork.ValuePolicy(take=[3])  # type: ignore[list-item]


def test_beyond_the_limit_a_side_s_missing_values_are_no_difference_and_the_report_counts_them(
    seed_of: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = seed_of(model(0.02))
    whole = PublishedValues.packed

    def three(self: PublishedValues) -> PackedValues:
        packed = whole(self)
        assert packed is not None
        return PackedValues(pack_values(["training"], [True]), packed.salt, 10)

    monkeypatch.setattr(PublishedValues, "packed", three)
    report = fork_into(model(1.0), seed)
    assert different(report) == {}
    assert "10 plain values not looked at" in str(report)


LIES: dict[str, Any] = {
    "no page": lambda pages: pages[:-1],
    "a page more": lambda pages: [*pages, *pages],
    "no table": lambda pages: [b"\xc1"],
    "columns of other lengths": lambda pages: pack_pages([1], lambda _: {"name": ["a", "b"], "value": [1]}),
    "a name that is none": lambda pages: pack_values([3], [1]),  # type: ignore[list-item]
    "a long name": lambda pages: pack_values(["x" * 5000], [1]),
    "a name twice": lambda pages: pack_values(["a", "a"], [1, 1]),
    "a text": lambda pages: pack_values(["a"], ["text"]),  # type: ignore[list-item]
    "a short hash": lambda pages: pack_values(["a"], [b"x"]),
    "a list": lambda pages: pack_values(["a"], [[1.0] * 1000]),
    "too many": lambda pages: pack_values([str(i) for i in range(10_001)], [0] * 10_001),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("values", ["strict", "report"])
def test_values_that_are_none_are_a_protocol_error(
    seed_of: Publish, monkeypatch: pytest.MonkeyPatch, lie: str, values: str
) -> None:
    class Liar(list[bytes]):
        """Pages that are announced, and others that come."""

        def __iter__(self) -> Any:
            return iter(LIES[lie](list.copy(self)))

    seed, whole = seed_of(model(0.02)), PublishedValues.packed

    def lying(self: PublishedValues) -> PackedValues:
        packed = whole(self)
        assert packed is not None
        pages = Liar(packed.pages) if "page" in lie else LIES[lie](packed.pages)
        return PackedValues(pages, packed.salt, packed.beyond)

    monkeypatch.setattr(PublishedValues, "packed", lying)
    into = model(1.0).to("meta")
    with pytest.raises(tensorfork.ProtocolError):
        fork_into(into, seed, values=values)
    assert untouched(into, 1.0)
