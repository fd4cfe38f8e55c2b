"""Models whose names differ by a wrapper: the error says so in a line, and `rename=` bridges it."""

import re
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from processes import Child
from subclasses import Pair
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils.parametrize import register_parametrization
from wrapped_models import WRAPPERS, Model, compiled, compiled_layers, one_process_group

import tensorfork
from tensorfork.fork.rename import namer, object_in_seed
from tensorfork.model.walk import walk

SECONDS = 30.0


def values(model: Any) -> list[torch.Tensor]:
    """The tensors of a model that holds a `Model`, in an order that no name decides."""
    inner = next(module for module in model.modules() if isinstance(module, Model))
    inner_tensors = [*inner.parameters(), *inner.buffers(), *inner.scales]
    return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in inner_tensors]


def equal(model: Any, other: Any) -> bool:
    return all(map(torch.equal, values(model), values(other)))


def suggestion(error: tensorfork.LayoutMismatch) -> Any:
    """What the message says to give as `rename=`."""
    first = str(error).splitlines()[0]
    found = re.search(r"give rename=(.*) to fork_into", first)
    assert found is not None, first
    return eval(found[1])


def suggested(model: Any, seed: tensorfork.Seed, **options: Any) -> Any:
    with pytest.raises(tensorfork.LayoutMismatch) as raised:
        tensorfork.fork_into(model, seed.address, timeout=SECONDS, **options)
    assert len(str(raised.value)) < 1000
    return suggestion(raised.value)


# Real wrappers.


@pytest.mark.parametrize("form", ["in place", "meta"])
@pytest.mark.parametrize("wrapped_side", ["fork", "seed"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_the_error_suggests_bridges_a_wrapper(kind: str, wrapped_side: str, form: str) -> None:
    wrap = WRAPPERS[kind]
    theirs, plain = Model(1), Model(1)
    if form == "meta":
        with torch.device("meta"):
            ours: Any = Model()
    else:
        ours = Model(2)
    if wrapped_side == "fork":
        ours = wrap(ours)
    else:
        theirs = wrap(theirs)
    before = {name: id(tensor) for name, tensor in walk(ours).tensors.items()}
    with tensorfork.publish(theirs) as seed:
        rename = suggested(ours, seed, device="cpu")
        report = tensorfork.fork_into(ours, seed.address, rename=rename, device="cpu", timeout=SECONDS)
    assert report.verified
    assert report.values is not None
    assert not report.values.different
    assert report.tensors == len(before)
    assert equal(ours, plain)
    assert {name: id(tensor) for name, tensor in walk(ours).tensors.items()} == before


def test_ddp_is_the_module_that_it_wraps_under_another_name() -> None:
    with one_process_group():
        ours = nn.parallel.DistributedDataParallel(Model(2))
        ours(torch.tensor([1, 2, 3])).sum().backward()  # it keeps lists of tensors then
        with tensorfork.publish(Model(1)) as seed:
            assert suggested(ours, seed) == {"module.": ""}
            tensorfork.fork_into(ours, seed.address, rename={"module.": ""}, timeout=SECONDS)
        assert equal(ours, Model(1))
        with tensorfork.publish(ours) as seed:
            plain = Model(3)
            assert suggested(plain, seed) == {"": "module."}
            tensorfork.fork_into(plain, seed.address, rename={"": "module."}, timeout=SECONDS)
        assert equal(plain, Model(1))
        del ours


@pytest.mark.filterwarnings("ignore")
def test_fsdp_is_bridged_where_its_own_list_is_left_out() -> None:
    with one_process_group():
        inner = Model(2)
        inner.layers[0] = FullyShardedDataParallel(inner.layers[0], use_orig_params=True, device_id=torch.device("cpu"))
        ours = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
        with tensorfork.publish(Model(1)) as seed:
            rename = suggested(ours, seed, exclude=["params", "*.params"])
            report = tensorfork.fork_into(
                ours, seed.address, rename=rename, exclude=["params", "*.params"], timeout=SECONDS
            )
        assert report.verified
        assert equal(ours, Model(1))


def test_shards_are_compared_by_their_placement_under_another_name_too() -> None:
    with one_process_group():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        models = [Model(1), Model(2)]
        for model in models:
            fully_shard(model, mesh=mesh)
        theirs, ours = models[0], compiled(models[1])
        with tensorfork.publish(theirs) as seed:
            rename = suggested(ours, seed)
            tensorfork.fork_into(ours, seed.address, rename=rename, timeout=SECONDS)
            assert equal(ours, theirs)
            plain = compiled(Model(3))
            with pytest.raises(tensorfork.LayoutMismatch, match=r"placement Shard.* in the seed, whole here"):
                tensorfork.fork_into(plain, seed.address, rename=rename, timeout=SECONDS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_made_of_others_and_what_a_parametrization_hides_are_bridged_by_a_function(device: str) -> None:
    def build(value: float, device: str) -> nn.Module:
        module = nn.Module()
        module.quantized = Pair(torch.full((3, 2), value, device=device), torch.full((3, 1), value, device=device))
        module.linear = nn.Linear(2, 2, device=device)
        return module

    def name_in_seed(name: str) -> str:
        return name.removeprefix("inner.").replace("parametrizations.weight.original", "weight")

    theirs = build(3, "cpu")
    ours = nn.Module()
    ours.inner = build(1, device)
    register_parametrization(ours.inner.linear, "weight", nn.Identity(), unsafe=True)
    original = ours.inner.linear.parametrizations.weight.original
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, rename=name_in_seed, device="cpu", timeout=SECONDS)
    assert report.tensors == 4
    assert torch.equal(ours.inner.quantized.data_, theirs.quantized.data_)
    assert torch.equal(ours.inner.quantized.scale, theirs.quantized.scale)
    assert ours.inner.linear.parametrizations.weight.original is original
    assert torch.equal(ours.inner.linear.weight, theirs.linear.weight)


def publish_compiled(pipe: Connection) -> None:
    with tensorfork.publish(compiled_layers(Model(1))) as seed:
        pipe.send(seed.address)
        pipe.recv()


def test_a_plain_model_forks_from_a_compiled_one_of_another_process() -> None:
    with Child(publish_compiled) as child:
        with torch.device("meta"):
            ours = Model()
        address = child.recv()
        with pytest.raises(
            tensorfork.LayoutMismatch, match=r"only by the wrapper '_orig_mod\.' in the seed's: "
        ) as raised:
            tensorfork.fork_into(ours, address, device="cpu", timeout=SECONDS)
        tensorfork.fork_into(ours, address, rename=suggestion(raised.value), device="cpu", timeout=SECONDS)
        assert equal(ours, Model(1))
        child.send("done")


# What `rename=` means.


@pytest.mark.parametrize(
    ("rename", "ours", "theirs"),
    [
        ({"a.": ""}, "a.b.w", "b.w"),
        ({"a.": ""}, "b.a.w", "b.a.w"),
        ({"a.": "x.y."}, "a.w", "x.y.w"),
        ({"": "x."}, "a.w", "x.a.w"),
        ({"": "x.", "a.": ""}, "a.w", "w"),
        ({"a": "x"}, "a.w", "x.w"),
        ({"a": "x"}, "a[0]", "x[0]"),
        ({"a": "x"}, "a", "x"),
        ({"a": "x"}, "ab.w", "ab.w"),
        ({"a.b": "x", "a": "y"}, "a.b.w", "x.w"),
        ({"a.b": "x", "a": "y"}, "a.c.w", "y.c.w"),
        ({"l.*.m.": "l.*."}, "l.12.m.w", "l.12.w"),
        ({"l.*.m.": "l.*."}, "l.1.2.m.w", "l.1.2.m.w"),
        ({"l.*.": "k.", "l.0.": "z."}, "l.0.w", "z.w"),
        ({"l.*.*.": "*.*.l."}, "l.0.a.w", "0.a.l.w"),
        ({"d[*].": "e[*]."}, "d[3].w", "e[3].w"),
        ({"a.(b|c).": ""}, "a.b.w", "a.b.w"),
        (lambda name: name.replace("m.", ""), "m.l.0.m.w", "l.0.w"),
        (
            lambda name: name.replace("parametrizations.weight.original", "weight"),
            "a.parametrizations.weight.original",
            "a.weight",
        ),
        ({}, "a.w", "a.w"),
        (None, "a.w", "a.w"),
    ],
)
def test_a_name_of_ours_is_in_the_seed(rename: Any, ours: str, theirs: str) -> None:
    assert namer(rename)(ours) == theirs


@pytest.mark.parametrize(
    ("rename", "ours", "theirs"),
    [
        ({"l.*.m.": "l.*."}, "l.0.m", "l.0"),
        ({"l.*.m.": "l.*."}, "l.0.m.eps", "l.0.eps"),
        ({"l.*.": "l.*.m."}, "l.0", "l.0.m"),
        (lambda name: name.replace("m.", ""), "l.0.m", "l.0"),
        ({"m.": "", "m.l.*.m.": "l.*."}, "m.l.0.m", "l.0"),
        ({"m.": "", "m.l.*.m.": "l.*."}, "m.l.0", "l.0"),
        ({"m.l.0.eps": "eps"}, "m.l.0.eps", "eps"),
        ({"m.l.0.eps": "l.0.eps"}.__getitem__, "m.l.0.eps", "l.0.eps"),
        ({"m.": ""}, "m", "m"),
        ({}, "l.0", "l.0"),
    ],
)
def test_an_object_is_called_in_the_seed_as_what_lies_below_it_begins(rename: Any, ours: str, theirs: str) -> None:
    assert object_in_seed(namer(rename), ours) == theirs


@pytest.mark.parametrize(
    ("rename", "error", "why"),
    [
        ("_orig_mod.", TypeError, "a mapping of names' beginnings, or a function, not str"),
        ({"a.": 1}, TypeError, r"has 'a\.': 1"),
        ({"a.": "*."}, ValueError, r"more \* in the value"),
        (lambda name: None, TypeError, r"must return a name \(str\); for 'embed.weight' it returned None"),
        (lambda name: {}[name], ValueError, "failed for 'embed.weight': KeyError: 'embed.weight'"),
        (lambda name: "x", ValueError, "'embed.weight' and 'layers.0.0.weight' one name in the seed, 'x'"),
    ],
)
@pytest.mark.parametrize("form", ["in place", "meta"])
def test_a_bad_rename_is_an_error_before_the_seed_is_asked(form: str, rename: Any, error: Any, why: str) -> None:
    with torch.device("meta" if form == "meta" else "cpu"):
        ours = Model(2)
    with pytest.raises(error, match=why):
        tensorfork.fork_into(ours, "tcp://127.0.0.1:1", rename=rename, timeout=SECONDS)  # where nobody is
    assert ours.table.is_meta == (form == "meta")
    assert form == "meta" or equal(ours, Model(2))


def test_two_names_of_one_tensor_may_be_one_in_the_seed() -> None:
    theirs = {"w": torch.ones(4)}
    tied = torch.zeros(4)
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into({"a": tied, "b": tied}, seed.address, rename={"a": "w", "b": "w"}, timeout=SECONDS)
        assert torch.equal(tied, theirs["w"])
        apart = {"a": torch.zeros(4), "b": torch.zeros(4)}
        with pytest.raises(ValueError, match="'a' and 'b' one name"):
            tensorfork.fork_into(apart, seed.address, rename={"a": "w", "b": "w"}, timeout=SECONDS)


def test_names_may_be_exchanged() -> None:
    with tensorfork.publish({"a": torch.ones(2), "b": torch.full((2,), 2.0)}) as seed:
        ours = {"a": torch.zeros(2), "b": torch.zeros(2)}
        tensorfork.fork_into(ours, seed.address, rename={"a": "b", "b": "a"}, timeout=SECONDS)
    assert [ours["a"][0], ours["b"][0]] == [2.0, 1.0]


# In whose names.


@pytest.mark.parametrize("rename", [{"_orig_mod.": ""}, lambda name: name.replace("_orig_mod.", "")])
def test_patterns_and_what_is_left_out_are_in_our_names(rename: Any) -> None:
    ours = compiled(Model(2))
    with tensorfork.publish(Model(1)) as seed:
        report = tensorfork.fork_into(
            ours, seed.address, rename=rename, exclude=["_orig_mod.layers", "*scales"], timeout=SECONDS
        )
    assert torch.equal(ours.table, Model(1).table)
    assert torch.equal(ours.layers[0][0].weight, Model(2).layers[0][0].weight)
    assert len(report.left_out) == 3 * 7 + 2
    assert all(name.startswith("_orig_mod.") for name in report.left_out)
    with tensorfork.publish(Model(1)) as seed:
        report = tensorfork.fork_into(ours, seed.address, rename=rename, include="_orig_mod.layers.1", timeout=SECONDS)
    assert report.tensors == 7
    assert torch.equal(ours.layers[1][0].weight, Model(1).layers[1][0].weight)
    assert torch.equal(ours.layers[0][0].weight, Model(2).layers[0][0].weight)


def test_what_only_the_seed_has_is_chosen_by_what_it_would_be_called_here() -> None:
    theirs, ours = Model(1), compiled(Model(2))
    theirs.layers[1].cache = torch.zeros(3)
    rename = {"_orig_mod.": ""}
    with tensorfork.publish(theirs) as seed:
        with pytest.raises(tensorfork.LayoutMismatch) as raised:
            tensorfork.fork_into(ours, seed.address, rename=rename, timeout=SECONDS)
        assert raised.value.unexpected == ("layers.1.cache",)
        with pytest.raises(tensorfork.LayoutMismatch) as raised:
            tensorfork.fork_into(ours, seed.address, rename=rename, include="_orig_mod.layers.1", timeout=SECONDS)
        assert raised.value.unexpected == ("layers.1.cache",)
        for exclude in ("layers.1.cache", "_orig_mod.layers.1.cache", "*cache"):
            report = tensorfork.fork_into(ours, seed.address, rename=rename, exclude=exclude, timeout=SECONDS)
            assert report.left_out == ("layers.1.cache",)


def test_errors_have_our_names_and_say_what_was_looked_for() -> None:
    with tensorfork.publish({"a": torch.ones(2), "b": torch.ones(2)}) as seed:
        ours = {"x.a": torch.zeros(3), "x.c": torch.zeros(2)}
        with pytest.raises(tensorfork.LayoutMismatch) as raised:
            tensorfork.fork_into(ours, seed.address, rename={"x.": ""}, timeout=SECONDS)
    error = raised.value
    assert (error.missing, error.unexpected) == (("x.c",), ("b",))
    assert error.mismatched == (("x.a", "shape (2,) in the seed, (3,) here"),)
    assert "missing from the seed: x.c (there c)" in str(error)


def test_what_the_seed_leaves_out_is_said_under_another_name_too() -> None:
    ours = {"x.a": torch.zeros(2), "x.b": torch.zeros(2)}
    with (
        tensorfork.publish({"a": torch.ones(2), "b": torch.ones(2)}, exclude="b") as seed,
        pytest.raises(tensorfork.LayoutMismatch, match=r"x\.b \(there b\) \(it leaves it out"),
    ):
        tensorfork.fork_into(ours, seed.address, rename={"x.": ""}, timeout=SECONDS)


def test_a_wrong_byte_is_found_under_another_name() -> None:
    theirs = {"a": torch.ones(2), "b": torch.ones(2)}
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork(seed.address, timeout=SECONDS)  # the seed has its digests then
        theirs["b"][1] = 7
        ours = {"x.a": torch.zeros(2), "x.b": torch.zeros(2)}
        with pytest.raises(tensorfork.VerificationFailed) as raised:
            tensorfork.fork_into(ours, seed.address, rename={"x.": ""}, timeout=SECONDS)
        assert raised.value.tensors == ("x.b",)


def test_a_model_that_was_forked_under_other_names_is_of_the_same_lineage() -> None:
    theirs, ours = Model(1), compiled(Model(2))
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, rename={"_orig_mod.": ""}, timeout=SECONDS)
        assert report.version is not None
        with tensorfork.publish(ours) as relay:
            assert relay.version.lineage == seed.version.lineage
            tensorfork.fork_into(
                Model(3), relay.address, rename={"": "_orig_mod."}, at_least=report.version, timeout=SECONDS
            )
