"""Whole forks, over ZeroMQ, of every kind of tensor: within a process, and from another one."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from models import GENERATED, Tied, fingerprints, memory_of, scramble, strided, tensors_of, unused_bytes
from processes import Child
from torch import nn
from whole_forks import identities, on_meta, to_meta

import tensorfork
from tensorfork import Session, UnsupportedTensor, api
from tensorfork.fork import transfer
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow

SECONDS = 60.0


def publish_all(pipe: Connection) -> None:
    """Publish the generated models; send their addresses and fingerprints; serve until told to end."""
    with contextlib.ExitStack() as stack:
        models = {name: make() for name, make in GENERATED.items()}
        addresses = {name: stack.enter_context(tensorfork.publish(model)).address for name, model in models.items()}
        pipe.send((addresses, {name: fingerprints(model) for name, model in models.items()}))
        with contextlib.suppress(EOFError):
            pipe.recv()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[dict[str, str], dict[str, dict[str, str]]]]:
    """The generated models in another process: the address and the fingerprints of each."""
    with Child(publish_all) as child:
        yield child.recv()


# Every kind of tensor.


@pytest.mark.parametrize("name", GENERATED)
def test_a_model_from_another_process_is_filled_in_place_bit_for_bit(elsewhere: Any, name: str) -> None:
    addresses, wanted = elsewhere
    model = GENERATED[name]()
    scramble(model)
    before, around = identities(model), unused_bytes(model)
    report = tensorfork.fork_into(model, addresses[name], timeout=SECONDS)
    assert fingerprints(model) == wanted[name]
    assert identities(model) == before
    assert unused_bytes(model) == around
    assert report.verified
    assert report.tensors == len(wanted[name])


@pytest.mark.parametrize("name", [name for name in GENERATED if name != "many"])
def test_a_model_is_filled_in_place_bit_for_bit_within_a_process(seed_of: Any, name: str) -> None:
    source, model = GENERATED[name](), GENERATED[name]()
    scramble(model)
    before, around = identities(model), unused_bytes(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(source)
    assert identities(model) == before
    assert unused_bytes(model) == around


@pytest.mark.parametrize("name", GENERATED)
def test_a_fork_without_a_model_has_the_tensors_the_seed_has(elsewhere: Any, name: str) -> None:
    addresses, wanted = elsewhere
    tensors = tensorfork.fork(addresses[name], timeout=SECONDS)
    assert fingerprints(tensors) == wanted[name]
    for mine, theirs in zip(tensors.values(), tensors_of(GENERATED[name]()).values(), strict=True):
        assert (mine.dtype, mine.shape, mine.is_meta) == (theirs.dtype, theirs.shape, False)
        assert mine.stride() == theirs.stride() or 1 in mine.shape or not mine.numel()


@pytest.mark.parametrize("name", GENERATED)
def test_a_model_on_the_meta_device_becomes_the_seed_s_in_one_allocation(elsewhere: Any, name: str) -> None:
    addresses, wanted = elsewhere
    model = to_meta(GENERATED[name]())
    objects = {key: id(tensor) for key, tensor in tensors_of(model).items()}
    tensorfork.fork_into(model, addresses[name], timeout=SECONDS)
    assert fingerprints(model) == wanted[name]
    assert {key: id(tensor) for key, tensor in tensors_of(model).items()} == objects
    assert len({id_of_storage(tensor) for tensor in tensors_of(model).values()}) <= 1


def id_of_storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# What cannot be forked.


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": quantized,
    "lazy": lambda: nn.LazyLinear(3).weight,
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
}
quiet = pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:torch.quantize_per_tensor.*deprecated")


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_cannot_be_published_is_named(kind: str) -> None:
    with pytest.raises(UnsupportedTensor, match=r"^blocks\.3\.odd: "):
        tensorfork.publish({"fine": torch.ones(1), "blocks.3.odd": KINDS[kind]()})


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_cannot_be_filled_is_named_before_the_peer_is_asked(kind: str) -> None:
    with pytest.raises(UnsupportedTensor, match=r"^odd: "):
        tensorfork.fork_into({"odd": KINDS[kind]()}, "tcp://127.0.0.1:1", timeout=SECONDS)


def test_a_seed_s_tensor_without_memory_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), on_meta(lambda: nn.Linear(2, 2)))
    with pytest.raises(UnsupportedTensor, match=r"^1\.weight is on the meta device"):
        tensorfork.publish(model)


@pytest.mark.parametrize("thing", [42, None, "model", [torch.ones(1)]], ids=repr)
def test_what_is_not_a_model_is_a_type_error(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a model; give an nn\.Module, or a mapping of names to tensors"):
        tensorfork.publish(thing)
    with pytest.raises(TypeError, match=r"is not a model"):
        tensorfork.fork_into(thing, "tcp://127.0.0.1:1", timeout=SECONDS)


def test_nothing_listens_after_a_model_was_refused() -> None:
    with pytest.raises(OSError, match="cannot listen"), tensorfork.publish({"w": torch.ones(1)}) as seed:
        tensorfork.publish({"w": torch.ones(1)}, bind=seed.address)
    with pytest.raises(UnsupportedTensor):
        tensorfork.publish({"w": torch.eye(3).to_sparse()}, bind=seed.address)
    with tensorfork.publish({"w": torch.ones(1)}, bind=seed.address) as again:
        assert again.address == seed.address


# Lives.


def test_a_seed_keeps_what_it_published_alive(seed_of: Any) -> None:
    source = strided()
    wanted = fingerprints(source)
    seed = seed_of(source)
    del source
    gc.collect()
    assert fingerprints(tensorfork.fork(seed.address, timeout=SECONDS)) == wanted


def test_a_copy_lives_on_after_its_seed() -> None:
    source, model = Tied(), on_meta(Tied)
    with tensorfork.publish(source) as seed:
        tensors = tensorfork.fork(seed.address, timeout=SECONDS)
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    wanted = fingerprints(source)
    scramble(source)
    assert fingerprints(tensors) == fingerprints(model) == wanted


def test_a_fork_can_be_a_seed_in_its_turn(seed_of: Any) -> None:
    source = strided()
    first = tensorfork.fork(seed_of(source).address, timeout=SECONDS)
    second = tensorfork.fork(seed_of(first).address, timeout=SECONDS)
    assert fingerprints(second) == fingerprints(source)


def test_publishing_copies_nothing() -> None:
    model = {"w": torch.zeros(1000)}
    with tensorfork.publish(model) as seed:
        model["w"].fill_(7.0)
        assert tensorfork.fork(seed.address, timeout=SECONDS)["w"].tolist() == [7.0] * 1000
        assert memory_of(model).keys() == {model["w"].untyped_storage().data_ptr()}


# Real networks.


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=40, n_embd=32, n_layer=2, n_head=4)).eval()


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_transformer_built_on_the_meta_device_computes_what_the_seed_s_does(seed_of: Any, make: Any) -> None:
    torch.manual_seed(11)
    source, model = make(), on_meta(make)
    assert all(tensor.is_meta for tensor in tensors_of(model).values())
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        want, have = source(tokens), model(tokens)
    assert all(torch.equal(want[key], have[key]) for key in want if isinstance(want[key], torch.Tensor))
    assert fingerprints(model) == fingerprints(source)
    if make is gpt2:
        assert model.lm_head.weight is model.transformer.wte.weight


# In time. The bounds are five times those that benchmarks measure.


def test_twenty_thousand_tensors_are_published_and_forked() -> None:
    """How long that takes is for `python -m benchmarks cpu-publish-20000x4KiB cpu-20000x16KiB` to say."""
    model = GENERATED["many"]()
    with tensorfork.publish(model) as seed:
        report = tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert report.tensors == len(model) >= 20_000
    assert report.verified


def test_looking_at_a_large_model_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    look = api.describe

    def slow(*args: Any) -> Any:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            time.sleep(0.001)
        return look(*args)

    with tensorfork.publish({"x": torch.arange(10)}) as seed:
        monkeypatch.setattr(api, "describe", slow)
        with pytest.raises(tensorfork.TensorForkError):
            tensorfork.fork_into({"x": torch.zeros(10, dtype=torch.int64)}, seed.address, timeout=0.1)


def test_what_turns_out_not_to_work_when_it_is_to_be_ready_is_no_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the plans have been drawn up by then: that is what a transport's preparations may overlap with."""
    steps: list[str] = []
    make_plan = transfer.make_plan
    monkeypatch.setattr(transfer, "make_plan", lambda *args: (steps.append("plan"), make_plan(*args))[1])

    class Late(ZeroMQ):
        def open(self, *args: Any) -> Session:
            session = super().open(*args)

            def ready(deadline: float) -> None:
                steps.append("ready")
                raise tensorfork.TransportUnavailable("too late for this")

            monkeypatch.setattr(session, "ready", ready)
            return session

    with tensorfork.publish({"x": torch.arange(10)}) as seed:
        ours = {"x": torch.zeros(10, dtype=torch.int64)}
        with pytest.raises(tensorfork.TransportUnavailable, match="too late for this"):
            tensorfork.fork_into(ours, seed.address, transport=Late())
    assert steps == ["plan", "ready"]
    assert not ours["x"].any()
