"""The right model: identities and ranks are compared before anything else, and every difference is named."""

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorfork
from tensorfork import Identity, IdentityMismatch, Rank
from tensorfork.wire import messages, tables

pytestmark = pytest.mark.slow

SECONDS = 20.0
FULL = Identity(
    model="meta-llama/Llama-3.1-8B",
    revision="0e9e39f",
    dtype="bfloat16",
    quantization="fp8:per-channel",
    role="target",
    engine="vllm",
    engine_version="0.32",
    kernels={"attention": "flashinfer", "moe": "triton"},
    tags={"lora": "none"},
)
PLACE = Rank(tp=(1, 4), pp=(0, 2), ep=(3, 8), cp=(0, 1), dp=(2, 3))


def model() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(10), "b": torch.zeros(3)}


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    filled = {name: tensor + 1 for name, tensor in model().items()}
    with tensorfork.publish(filled, identity=FULL, rank=PLACE) as seed:
        yield seed


@pytest.fixture(scope="module")
def nameless() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(model()) as seed:
        yield seed


def mismatch(seed: tensorfork.Seed, **given: Any) -> IdentityMismatch:
    ours = model()
    with pytest.raises(IdentityMismatch) as caught:
        tensorfork.fork_into(ours, seed.address, timeout=SECONDS, **given)
    assert not any(bool(tensor.any()) for tensor in ours.values())
    with pytest.raises(IdentityMismatch):
        tensorfork.fork(seed.address, timeout=SECONDS, **given)
    for name, (theirs, here) in caught.value.fields.items():
        assert f"{name}: {theirs!r} in the seed, {here!r} here" in str(caught.value)
    return caught.value


def changed(**fields: Any) -> Identity:
    return Identity(**{**FULL.as_dict(), **fields})


def test_equal_identities_and_ranks_fork_and_the_report_says_nothing_was_left_uncompared(seed: tensorfork.Seed) -> None:
    ours = model()
    report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS, identity=changed(), rank=PLACE)
    assert report.not_compared == ()
    assert "not compared" not in str(report)
    assert all(bool(tensor.all()) for tensor in ours.values())


@pytest.mark.parametrize(
    ("field", "ours"),
    [
        ("model", "meta-llama/Llama-3.1-8B-Instruct"),
        ("revision", "main"),
        ("dtype", "float16"),
        ("quantization", "fp8:per-tensor"),
        ("role", "draft"),
        ("engine", "sglang"),
        ("engine_version", "0.31"),
        ("revision", None),
    ],
)
def test_a_field_that_differs_is_named_with_both_values(seed: tensorfork.Seed, field: str, ours: str | None) -> None:
    error = mismatch(seed, identity=changed(**{field: ours}))
    assert error.fields == {field: (FULL.as_dict()[field], ours)}


def test_entries_of_kernels_and_tags_are_compared_one_by_one(seed: tensorfork.Seed) -> None:
    error = mismatch(seed, identity=changed(kernels={"attention": "fa3", "moe": "triton", "gemm": "deep"}, tags={}))
    assert error.fields == {
        "kernels['attention']": ("flashinfer", "fa3"),
        "kernels['gemm']": (None, "deep"),
        "tags['lora']": ("none", None),
    }


def test_every_differing_field_is_named_at_once(seed: tensorfork.Seed) -> None:
    error = mismatch(seed, identity=changed(model="x", role="draft"), rank=Rank(tp=(0, 4)))
    assert set(error.fields) == {"model", "role", "rank.tp", "rank.pp", "rank.ep"}
    assert error.fields["rank.tp"] == ((1, 4), (0, 4))


@pytest.mark.parametrize("along", ["tp", "pp", "ep", "cp"])
def test_another_coordinate_is_another_part_of_the_model(seed: tensorfork.Seed, along: str) -> None:
    other = {**PLACE.as_dict(), along: (1, 16)}
    assert set(mismatch(seed, rank=Rank(**other)).fields) == {f"rank.{along}"}


def test_data_parallel_coordinates_are_never_compared(seed: tensorfork.Seed) -> None:
    for dp in ((0, 3), (2, 3), (0, 1), (7, 100)):
        tensorfork.fork_into(model(), seed.address, timeout=SECONDS, rank=Rank(**{**PLACE.as_dict(), "dp": dp}))


def test_a_seed_that_says_nothing_is_not_what_a_fork_asks_for(nameless: tensorfork.Seed) -> None:
    error = mismatch(nameless, identity=Identity(model="x", tags={"a": "b"}), rank=Rank())
    assert error.fields == {"model": (None, "x"), "tags['a']": (None, "b"), "rank": (None, Rank())}


def test_the_report_says_what_was_not_compared(seed: tensorfork.Seed, nameless: tensorfork.Seed) -> None:
    def fork(**given: Any) -> tensorfork.ForkReport:
        return tensorfork.fork_into(model(), seed.address, timeout=SECONDS, **given)

    assert fork().not_compared == ("identity", "rank")
    assert str(fork()).endswith("verified; not compared: identity, rank")
    assert fork(identity=FULL).not_compared == ("rank",)
    unverified = fork(rank=PLACE, verify=False)
    assert unverified.not_compared == ("identity", "digests")
    assert str(unverified).endswith("NOT verified; not compared: identity")
    assert tensorfork.fork_into(model(), nameless.address, timeout=SECONDS).not_compared == ("identity", "rank")


def test_identity_comes_before_the_layout_and_before_a_lease(seed: tensorfork.Seed) -> None:
    """Otherwise an engine would be told of shapes where what is wrong is the model."""
    before = seed.stats()
    with pytest.raises(IdentityMismatch):
        tensorfork.fork_into({"other": torch.zeros(1)}, seed.address, timeout=SECONDS, identity=Identity(model="x"))
    assert seed.stats() == before


def test_a_seed_says_what_it_is(seed: tensorfork.Seed, nameless: tensorfork.Seed) -> None:
    assert (seed.identity, seed.rank) == (FULL, PLACE)
    assert (seed.layout.identity, seed.layout.rank) == (FULL, PLACE)
    assert (nameless.identity, nameless.rank) == (None, None)


TEXTS = st.text(max_size=20)
IDENTITIES = st.builds(
    Identity,
    **dict.fromkeys(
        ["model", "revision", "dtype", "quantization", "role", "engine", "engine_version"], st.none() | TEXTS
    ),
    kernels=st.dictionaries(TEXTS, TEXTS, max_size=3),
    tags=st.dictionaries(TEXTS, TEXTS, max_size=3),
)


@given(IDENTITIES, IDENTITIES)
def test_two_identities_are_equal_exactly_when_nothing_differs(one: Identity, other: Identity) -> None:
    assert (one == other) == (not one.differences(other))
    assert not one.differences(Identity(**one.as_dict()))
    assert {name: (b, a) for name, (a, b) in one.differences(other).items()} == dict(other.differences(one))


@given(st.none() | IDENTITIES, st.none() | st.builds(Rank, tp=st.integers(0, 7).map(lambda i: (i, 8))))
def test_what_travels_is_what_was_said(identity: Identity | None, rank: Rank | None) -> None:
    sent = messages.Welcome(
        "0",
        b"",
        0,
        0,
        0,
        "",
        {},
        0,
        messages.WeightsVersion("lineage", 0),
        None if identity is None else identity.as_dict(),
        None if rank is None else rank.as_dict(),
    )
    _, came = messages.decode(messages.encode(sent, 1), messages.REPLIES)
    assert tables.unpack_identity(came) == (identity, rank)


@pytest.mark.parametrize(
    ("identity", "rank"),
    [
        ({"model": 3}, None),
        ({"name": "x"}, None),
        ({"model": "x" * 5000}, None),
        ({"kernels": 5}, None),
        ({"kernels": "x"}, None),
        ({"tags": ["x"]}, None),
        ({"kernels": {"a": 1}}, None),
        ({"kernels": {str(i): "" for i in range(300)}}, None),
        ({1: "x"}, None),
        ([], None),
        ("x", None),
        (None, {"tp": 3}),
        (None, {"tp": [0]}),
        (None, {"tp": [4, 4]}),
        (None, {"tp": [-1, 4]}),
        (None, {"tp": [True, 4]}),
        (None, {"xp": [0, 4]}),
        (None, [0, 1]),
    ],
)
def test_a_seed_that_says_nonsense_of_itself_is_a_protocol_error(identity: Any, rank: Any) -> None:
    body = {
        "library": "0",
        "seed": b"",
        "tensors": 0,
        "storages": 0,
        "nbytes": 0,
        "digest": "",
        "transports": {},
        "publication": 0,
        "version": {"lineage": "", "counter": 0, "label": None, "content": None},
        "identity": identity,
        "rank": rank,
    }
    frame = msgpack.packb([messages.MAGIC, messages.VERSION, 1, "Welcome", body])
    with pytest.raises(tensorfork.ProtocolError):
        tables.unpack_identity(messages.decode(frame, messages.REPLIES)[1])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Identity(model=3),
        lambda: Identity(tags={"a": 1}),
        lambda: Identity(tags=["a"]),
        lambda: Rank(tp=3),
        lambda: Rank(tp=[0, 1]),
        lambda: Rank(tp=(0.0, 1)),
        lambda: Identity("x"),
    ],
)
def test_what_is_no_identity_or_rank_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        wrong()


def test_an_index_must_be_below_its_size() -> None:
    for wrong in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="index below the size"):
            Rank(pp=wrong)


def test_an_identity_does_not_change_with_what_it_was_made_from() -> None:
    tags = {"a": "b"}
    identity = Identity(tags=tags)
    tags["a"] = "c"
    assert identity.tags == {"a": "b"}
    with pytest.raises(TypeError):
        identity.tags["a"] = "c"


# What is left out.


def test_what_is_left_out_on_either_side_is_in_the_report() -> None:
    ours = {"w": torch.zeros(4), "handler_tensor": torch.tensor([7]), "cache": torch.zeros(2)}
    theirs = {"w": torch.ones(4), "handler_tensor": torch.tensor([9]), "cache": torch.ones(3), "extra": torch.ones(1)}
    with tensorfork.publish(theirs, exclude=["handler_tensor"]) as seed:
        assert seed.layout.left_out == ("handler_tensor",)
        report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS, exclude=["handler_tensor", "cache", "extra"])
        assert set(report.left_out) == {"handler_tensor", "cache", "extra"}
        assert report.left_out_by_seed == ("handler_tensor",)
        assert "left out: 3 here, 1 by the seed" in str(report)
        assert report.tensors == 1
        assert ours["handler_tensor"].tolist() == [7]
        assert ours["cache"].tolist() == [0, 0]
        assert ours["w"].tolist() == [1, 1, 1, 1]


def test_what_only_the_seed_leaves_out_is_a_mismatch_that_says_so() -> None:
    with tensorfork.publish(model(), exclude="b") as seed, pytest.raises(tensorfork.LayoutMismatch) as caught:
        tensorfork.fork_into(model(), seed.address, timeout=SECONDS)
    assert caught.value.missing == ("b",)
    assert "missing from the seed: b (it leaves it out; exclude it here too, or publish it)" in str(caught.value)


def test_a_fork_without_a_model_takes_what_it_names() -> None:
    with tensorfork.publish({"a.w": torch.ones(3), "a.b": torch.ones(1), "c": torch.ones(1 << 20)}) as seed:
        taken = tensorfork.fork(seed.address, timeout=SECONDS, include="a", exclude="*.b")
        assert list(taken) == ["a.w"]
        assert taken["a.w"].tolist() == [1, 1, 1]
        assert taken["a.w"].untyped_storage().nbytes() < 4096
        with pytest.raises(ValueError, match="include='d' means no tensor of the seed"):
            tensorfork.fork(seed.address, timeout=SECONDS, include=["c", "d"])


def test_twenty_thousand_names_may_be_left_out() -> None:
    many = {f"layer.{i}": torch.ones(1) for i in range(20_000)}
    with tensorfork.publish({**many, "w": torch.ones(2)}, include="w") as seed:
        report = tensorfork.fork_into({"w": torch.zeros(2)}, seed.address, timeout=SECONDS)
    assert list(report.left_out_by_seed) == list(many)
