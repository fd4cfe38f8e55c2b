"""Whole forks, over ZeroMQ, of every kind of tensor: within a process, and from another one."""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from models import GENERATED, Tied, fingerprints, memory_of, scramble, strided, tensors_of, tied_many_runs, unused_bytes
from processes import Child
from torch import nn

import tensorfork
from tensorfork import LayoutMismatch, Session, UnsupportedTensor, api
from tensorfork.fork import exclusive, transfer
from tensorfork.fork.strided import SCRATCH
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.model.describe import describe
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire.conversation import Conversation

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


@pytest.fixture
def seed_of() -> Iterator[Callable[[Any], tensorfork.Seed]]:
    """Publishes models in this process, for one test."""
    with contextlib.ExitStack() as stack:
        yield lambda model: stack.enter_context(tensorfork.publish(model))


def identities(model: Any) -> dict[str, Any]:
    """What must not change of tensors that are filled in place."""
    return {
        name: (id(t), t.data_ptr(), t.untyped_storage().data_ptr(), t.requires_grad, id(t.grad), t.stride(), type(t))
        for name, t in tensors_of(model).items()
    }


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


def to_meta(model: Any) -> Any:
    """The same model without memory, sharing as the model does."""
    storages: dict[int, torch.UntypedStorage] = {}
    done: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            storage = tensor.untyped_storage()
            base = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
            base = storages.setdefault(storage.data_ptr(), base) if tensor.numel() else base
            made = torch.empty(0, dtype=tensor.dtype, device="meta")
            made.set_(base, tensor.storage_offset() if tensor.numel() else 0, tensor.shape, tensor.stride())
            parameter = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if parameter else made
        return done[id(tensor)]

    if isinstance(model, dict):
        return {name: convert(tensor) for name, tensor in model.items()}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: convert(tensor) for name, tensor in held.items() if tensor is not None})
    return model


# In place.


def default_dtype() -> Any:
    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return changed()


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "meta as the default device": lambda: torch.device("meta"),
    "another default dtype": default_dtype,
    "saved tensors on the CPU": lambda: torch.autograd.graph.save_on_cpu(),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_caller_s_mode_changes_nothing(seed_of: Any, mode: str) -> None:
    source, model, meta = Tied(), Tied(), to_meta(Tied())
    combs, more_combs = tied_many_runs(), tied_many_runs()
    scramble(model)
    scramble(more_combs)
    seed, comb_seed, before = seed_of(source), seed_of(combs), identities(model)
    with MODES[mode]():
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
        tensorfork.fork_into(meta, seed.address, timeout=SECONDS)
        tensorfork.fork_into(more_combs, comb_seed.address, timeout=SECONDS)
        copy = tensorfork.fork(seed.address, timeout=SECONDS)
    assert identities(model) == before
    for one in (model, meta, copy):
        assert fingerprints(one) == fingerprints(source)
    assert fingerprints(more_combs) == fingerprints(combs)
    assert not any(tensor.is_inference() for tensor in (*tensors_of(meta).values(), *copy.values()))
    assert all(parameter.requires_grad for parameter in meta.parameters())


@pytest.mark.parametrize("mode", ["inference mode", "no_grad", "meta as the default device"])
def test_the_caller_s_mode_changes_nothing_for_a_seed(mode: str) -> None:
    source = Tied()
    with MODES[mode](), tensorfork.publish(source) as seed:
        pass_by = tensorfork.fork(seed.address, timeout=SECONDS)
    assert fingerprints(pass_by) == fingerprints(source)


def test_tensors_made_under_inference_mode_are_filled_like_others(seed_of: Any) -> None:
    with torch.inference_mode():
        source, model = {"w": torch.ones(5)}, {"w": torch.zeros(5)}
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert torch.equal(model["w"], torch.ones(5))
    assert model["w"].is_inference()


def test_gradients_and_their_requirement_stay(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    model.head.requires_grad_(False)
    model.one.weight.grad = torch.full((8, 8), 3.0)
    gradient, before = model.one.weight.grad, identities(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert identities(model) == before
    assert model.one.weight.grad is gradient
    assert torch.equal(gradient, torch.full((8, 8), 3.0))


def test_ties_stay_ties(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    scramble(model)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        model.head.weight[0, 0] = 42.0
    assert model.embedding.weight[0, 0] == 42.0


def test_autograd_notices_that_a_tensor_was_filled(seed_of: Any) -> None:
    """What was computed from the old values must not be differentiated with the new ones."""
    model = nn.Linear(3, 3)
    loss = model(model(torch.ones(3))).sum()
    tensorfork.fork_into(model, seed_of(nn.Linear(3, 3)).address, timeout=SECONDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_that_a_tensor_may_have_been_filled_when_the_fork_failed(seed_of: Any) -> None:
    model = nn.Linear(3, 3)
    loss = model(model(torch.ones(3))).sum()

    def stop(now: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorfork.fork_into(model, seed_of(nn.Linear(3, 3)).address, timeout=SECONDS, progress=stop)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tie_of_the_seed_s_alone_is_copied_to_each(seed_of: Any) -> None:
    tied = torch.randn(40)
    model = {"a": torch.zeros(40), "b": torch.zeros(40)}
    tensorfork.fork_into(model, seed_of({"a": tied, "b": tied}).address, timeout=SECONDS)
    assert torch.equal(model["a"], tied)
    assert torch.equal(model["b"], tied)
    assert model["a"].data_ptr() != model["b"].data_ptr()


def test_a_tie_of_ours_alone_is_a_mismatch_and_nothing_is_touched(seed_of: Any) -> None:
    seed, tied = seed_of({"a": torch.zeros(40), "b": torch.zeros(40)}), torch.ones(40)
    with pytest.raises(LayoutMismatch, match="b: shares memory with a here"):
        tensorfork.fork_into({"a": tied, "b": tied}, seed.address, timeout=SECONDS)
    assert torch.equal(tied, torch.ones(40))
    assert seed.stats().granted == 0


def test_a_mismatch_lists_all_and_comes_before_a_lease(seed_of: Any) -> None:
    seed = seed_of(
        {"same": torch.zeros(2), "dtype": torch.zeros(2), "shape": torch.zeros(2, 3), "extra": torch.zeros(1)}
    )
    model = {
        "same": torch.ones(2),
        "dtype": torch.ones(2, dtype=torch.int32),
        "shape": torch.ones(3, 2),
        "lacking": torch.ones(1),
    }
    before = fingerprints(model)
    with pytest.raises(LayoutMismatch) as raised:
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert (raised.value.missing, raised.value.unexpected) == (("lacking",), ("extra",))
    assert [name for name, _ in raised.value.mismatched] == ["dtype", "shape"]
    assert fingerprints(model) == before
    assert seed.stats().granted == 0


def test_scratch_for_thousands_of_stretches_is_bounded(seed_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    empty = torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = empty(*size, **options)
        asked.append(tensor.nbytes)
        return tensor

    source, model = tied_many_runs(), tied_many_runs()
    scramble(model)
    seed = seed_of(source)
    monkeypatch.setattr(torch, "empty", watched)
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert max(asked) == SCRATCH
    monkeypatch.undo()
    assert fingerprints(model) == fingerprints(source)


def test_progress_goes_from_nothing_to_everything(seed_of: Any) -> None:
    """Whatever the way: straight into place, and through scratch."""
    seen: list[tuple[int, int]] = []
    report = tensorfork.fork_into(
        tied_many_runs(),
        seed_of(tied_many_runs()).address,
        timeout=SECONDS,
        progress=lambda now, all: seen.append((now, all)),
    )
    assert seen[0] == (0, report.nbytes)
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(seen)


# On the meta device.


def on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def test_parameters_keep_their_attributes_their_class_and_their_ties(seed_of: Any) -> None:
    class Special(nn.Parameter):
        pass

    model = on_meta(Tied)
    model.one.weight = Special(model.one.weight, requires_grad=False)
    model.one.weight.weight_loader = model.register_buffer
    model.one.weight.output_dim = 1
    before = dict(model.named_parameters())
    tensorfork.fork_into(model, seed_of(Tied()).address, timeout=SECONDS)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert type(model.one.weight) is Special
    assert not model.one.weight.requires_grad
    assert model.other.bias is model.one.bias
    assert (model.one.weight.weight_loader, model.one.weight.output_dim) == (model.register_buffer, 1)
    assert model.head.weight is model.embedding.weight
    assert model.one.table is model.table
    assert fingerprints(model) == fingerprints(Tied())


def test_a_model_that_took_memory_trains_like_another(seed_of: Any) -> None:
    source, model = Tied(), on_meta(Tied)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    losses = []
    for one in (source, model):
        loss = one.head(one.one(one.embedding(torch.arange(5)))).square().sum()
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        losses.append(loss)
    assert losses[0] == losses[1]
    assert fingerprints(source) == fingerprints(model)


def test_views_of_the_seed_s_share_memory_in_the_copy_as_well(seed_of: Any) -> None:
    base = torch.arange(100.0)
    seed = seed_of({"whole": base, "part": base[10:20]})
    with torch.device("meta"):
        apart = {"whole": torch.empty(100), "part": torch.empty(10)}
    tensorfork.fork_into(apart, seed.address, timeout=SECONDS)
    copy = tensorfork.fork(seed.address, timeout=SECONDS)
    for model in (apart, copy):
        model["part"].fill_(-1.0)
        assert model["whole"][10:20].tolist() == [-1.0] * 10


def test_a_model_that_is_partly_on_the_meta_device_is_filled_and_given_memory(seed_of: Any) -> None:
    source, model = Tied(), Tied()
    model.embedding, model.head = on_meta(lambda: (nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)))
    model.head.weight = model.embedding.weight
    there = {name: tensor for name, tensor in tensors_of(model).items() if not tensor.is_meta}
    scramble(there)
    before = identities(there)
    tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(source)
    assert identities(there) == before
    assert model.head.weight is model.embedding.weight


def test_ties_on_the_meta_device_that_the_seed_has_not_are_a_mismatch_and_stay_meta(seed_of: Any) -> None:
    source = Tied()
    source.head.weight = nn.Parameter(torch.ones(50, 8))
    model = on_meta(Tied)
    with pytest.raises(LayoutMismatch, match=r"head\.weight: shares memory with embedding\.weight here"):
        tensorfork.fork_into(model, seed_of(source).address, timeout=SECONDS)
    assert all(tensor.is_meta for tensor in tensors_of(model).values())


@pytest.mark.parametrize("failure", ["mismatch", "no such device", "no such transport", "closed seed"])
def test_a_meta_model_stays_meta_after_a_failure_and_can_be_forked_into_after_that(failure: str) -> None:
    source, model = Tied(), on_meta(Tied)
    with tensorfork.publish(source) as seed, tensorfork.publish({"x": torch.ones(1)}) as other:
        peer, options = seed.address, {"timeout": SECONDS}
        if failure == "mismatch":
            peer = other.address
        elif failure == "no such device":
            options["device"] = "meta"
        elif failure == "no such transport":
            options["transport"] = "pigeon"
        else:
            gone = tensorfork.publish(source)
            gone.close()
            peer, options["timeout"] = gone.address, 0.5
        objects = {name: id(tensor) for name, tensor in tensors_of(model).items()}
        with pytest.raises((tensorfork.TensorForkError, ValueError)):
            tensorfork.fork_into(model, peer, **options)
        assert all(tensor.is_meta for tensor in tensors_of(model).values())
        tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert {name: id(tensor) for name, tensor in tensors_of(model).items()} == objects
    assert fingerprints(model) == fingerprints(source)


def test_the_device_that_is_asked_for_is_used(seed_of: Any) -> None:
    model = on_meta(Tied)
    tensorfork.fork_into(model, seed_of(Tied()).address, device=torch.device("cpu"), timeout=SECONDS)
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}


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


def test_twenty_thousand_tensors_are_published_and_described_in_time() -> None:
    model = GENERATED["many"]()
    start = time.perf_counter()
    seed = tensorfork.publish(model)
    published = time.perf_counter() - start
    with seed:
        report = tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert published < 5 * 0.5
    assert report.seconds["layout"] < 5 * 0.5


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


def test_garbage_waits_for_a_fork_and_not_for_a_seed_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections are put off for the first seconds of a fork, however long it then waits."""
    off: list[bool] = []
    request = Conversation.request

    def slow(conversation: Conversation, *args: Any) -> Any:
        off.append(not gc.isenabled())
        end = time.monotonic() + SECONDS
        while not gc.isenabled():
            assert time.monotonic() < end
            time.sleep(0.001)
        return request(conversation, *args)

    monkeypatch.setattr(Conversation, "request", slow)
    monkeypatch.setattr(api, "GC_PAUSE", 0.5)
    with tensorfork.publish({"x": torch.arange(10)}) as seed:
        tensorfork.fork_into({"x": torch.zeros(10, dtype=torch.int64)}, seed.address)
    assert off[0]
    assert not any(off[1:])
    assert gc.isenabled()


def test_collections_come_on_again_whatever_happens_and_are_left_alone_after_that() -> None:
    with gc_paused(0.001):
        end = time.monotonic() + SECONDS
        while not gc.isenabled():
            assert time.monotonic() < end
            time.sleep(0.001)
        gc.disable()  # somebody else, after the time was over
    assert not gc.isenabled()
    gc.enable()
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()


def test_collections_come_on_again_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(RuntimeError), gc_paused(60):
        raise AssertionError
    assert gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests leave torch's threads
def test_a_process_that_is_forked_off_meanwhile_collects() -> None:
    with gc_paused(60):
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert not gc.isenabled()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nobody_who_switched_collections_off_finds_them_on_after_a_fork() -> None:
    gc.disable()
    try:
        with tensorfork.publish({"x": torch.arange(10)}) as seed:
            tensorfork.fork_into({"x": torch.zeros(10, dtype=torch.int64)}, seed.address)
        assert not gc.isenabled()
    finally:
        gc.enable()


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


# Two at once.


def layers(device: str = "cpu", nbytes: int = 4000) -> dict[str, torch.Tensor]:
    return {name: torch.full((nbytes // 4,), float(i), device=device) for i, name in enumerate(("a.w", "b.w"), 1)}


def in_one_allocation(nbytes: int = 4000) -> dict[str, torch.Tensor]:
    """As a fork leaves them that made them."""
    buffer = torch.zeros(nbytes // 2)
    return dict(zip(("a.w", "b.w"), buffer.split(nbytes // 4), strict=True))


MODELS = {"each by itself": layers, "in one allocation": in_one_allocation, "meta": lambda: layers("meta")}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("part_first", [False, True], ids=["the whole first", "a part first"])
def test_a_fork_into_what_is_being_filled_is_refused(
    seed_of: Callable[[Any], tensorfork.Seed], make: Callable[[], dict[str, torch.Tensor]], part_first: bool
) -> None:
    model, refused = make(), list[str]()
    part = {"again": model["b.w"]}
    whole, other = seed_of(layers()), seed_of({"again": torch.full((1000,), 9.0)})
    first, second = (part, other), (model, whole)
    if not part_first:
        first, second = second, first

    def fork(into: Any, seed: tensorfork.Seed, progress: Any = None) -> None:
        tensorfork.fork_into(into, seed.address, device="cpu", transport="zeromq", timeout=SECONDS, progress=progress)

    def meanwhile(_done: int, _total: int) -> None:
        with pytest.raises(ValueError, match="under way") as caught:
            fork(*second)
        refused.append(str(caught.value))

    fork(*first, meanwhile)
    assert refused
    assert fingerprints(first[0]) == fingerprints({"again": torch.full((1000,), 9.0)} if part_first else layers())
    fork(*second)  # it is over


def test_what_two_forks_have_in_common_is_bytes_and_not_pages(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    model, done = in_one_allocation(nbytes=64), list[int]()
    model["empty"] = torch.empty(0)
    seed = seed_of({**layers(nbytes=64), "empty": torch.empty(0)})

    def meanwhile(*_: int) -> None:
        part = {"b.w": model["b.w"], "empty": torch.empty(0)}
        done.append(tensorfork.fork_into(part, seed.address, include=["b", "empty"], timeout=SECONDS).tensors)

    tensorfork.fork_into(model, seed.address, include=["a", "empty"], timeout=SECONDS, progress=meanwhile)
    assert done[0] == 2
    assert fingerprints(model) == fingerprints({**layers(nbytes=64), "empty": torch.empty(0)})


def test_a_model_that_was_filled_after_it_was_looked_at_is_refused(
    seed_of: Callable[[Any], tensorfork.Seed], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, model, alone = seed_of(layers()), layers("meta"), exclusive.exclusive_fill

    def late(ours: Any) -> Any:
        monkeypatch.setattr(api, "exclusive_fill", alone)
        tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
        return alone(ours)

    monkeypatch.setattr(api, "exclusive_fill", late)
    with pytest.raises(ValueError, match="fork again"):
        tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert fingerprints(model) == fingerprints(layers())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_whoever_is_not_refused_fills_the_model(
    seed_of: Callable[[Any], tensorfork.Seed], make: Callable[[], dict[str, torch.Tensor]]
) -> None:
    seed, model, ended = seed_of(layers()), make(), list[str]()
    together = threading.Barrier(4)

    def fork() -> None:
        together.wait(SECONDS)
        try:
            tensorfork.fork_into(model, seed.address, device="cpu", transport="zeromq", timeout=SECONDS)
            ended.append("filled")
        except ValueError:
            ended.append("refused")

    threads = [threading.Thread(target=fork) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(ended) == together.parties
    assert "filled" in ended
    assert fingerprints(model) == fingerprints(layers())
    gc.collect()
    assert not exclusive._in_progress


def test_a_fork_that_ends_while_another_is_looked_at_disturbs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    surveys = [describe(layers()) for _ in range(4)]
    overlap, looks = exclusive._overlap, list[bool]()
    with contextlib.ExitStack() as others:
        for ours in surveys[1:]:
            others.enter_context(exclusive.exclusive_fill(ours))

        def ending(one: Any, other: Any) -> bool:
            others.close()
            looks.append(overlap(one, other))
            return looks[-1]

        monkeypatch.setattr(exclusive, "_overlap", ending)
        with exclusive.exclusive_fill(surveys[0]):
            assert looks == [False] * 3
    assert not exclusive._in_progress


def test_models_with_tied_tensors_are_filled_at_once(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    def tied(device: str) -> dict[str, torch.Tensor]:
        both = torch.full((100,), 3.0, device=device)
        return {"one": both, "other": both, "part": both[10:20]}

    seed, done = seed_of(tied("cpu")), list[int]()
    models = [{name: torch.zeros_like(t) for name, t in tied("cpu").items()} for _ in range(2)]
    for model in models:
        model["other"], model["part"] = model["one"], model["one"][10:20]

    def meanwhile(*_: int) -> None:
        done.append(tensorfork.fork_into(models[1], seed.address, timeout=SECONDS).tensors)

    tensorfork.fork_into(models[0], seed.address, timeout=SECONDS, progress=meanwhile)
    assert done
    assert all(fingerprints(model) == fingerprints(tied("cpu")) for model in models)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests leave torch's threads
def test_a_child_process_may_fill_what_its_parent_was_filling() -> None:
    ours = describe(layers())
    with exclusive.exclusive_fill(ours), exclusive._lock:
        if not (child := os.fork()):
            try:
                with exclusive.exclusive_fill(ours):
                    os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_parts_of_a_model_are_filled_at_once(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    seed, model, filled = seed_of(layers()), layers("meta"), list[int]()

    def meanwhile(done: int, _total: int) -> None:
        if not done:
            report = tensorfork.fork_into(model, seed.address, device="cpu", include="b", timeout=SECONDS)
            filled.append(report.tensors)

    tensorfork.fork_into(model, seed.address, device="cpu", include="a", timeout=SECONDS, progress=meanwhile)
    assert filled == [1]
    assert fingerprints(model) == fingerprints(layers())


def test_a_model_whose_fork_failed_may_be_forked_into_again(seed_of: Callable[[Any], tensorfork.Seed]) -> None:
    seed, model = seed_of(layers()), layers("meta")

    def fail(done: int, _total: int) -> None:
        if done:
            raise RuntimeError("of the caller's")

    with pytest.raises(RuntimeError, match="of the caller's"):
        tensorfork.fork_into(model, seed.address, device="cpu", transport="gloo", timeout=SECONDS, progress=fail)
    tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    assert fingerprints(model) == fingerprints(layers())
