"""The digests of a seed's weights, without a fork: what a fork would be verified against, or the error it would get."""

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve
from processes import Child, serve
from seed_leases import SECONDS, model, until
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorfork
from tensorfork.seed import digests as digests_module
from tensorfork.seed.leases import RELEASED
from tensorfork.seed.service import SeedService


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return model()


@pytest.fixture
def seed(tensors: dict[str, torch.Tensor]) -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(tensors) as seed:
        yield seed


def of(seed: tensorfork.Seed, **options: Any) -> tensorfork.Digests:
    return tensorfork.digests(seed.address, timeout=SECONDS, **options)


# What they are.


def test_they_are_the_same_of_a_seed_from_afar_in_its_process_and_of_its_model() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    module.tied = module[0].weight
    with tensorfork.publish(module, version="step-7") as seed:
        found = of(seed)
        report = tensorfork.fork_into(copy.deepcopy(module), seed.address, timeout=SECONDS)
        assert found == seed.digests() == tensorfork.digests(module)
        assert report.version is not None
        assert found.content == seed.digests().content == tensorfork.digests(module).content == report.version.content
        assert found.version == seed.digests().version == seed.version == report.version
        assert (found.generation, seed.digests().generation) == (0, 0)
        assert tensorfork.digests(module).version is tensorfork.digests(module).generation is None
    assert list(found) == [tensor.name for tensor in seed.layout.tensors]
    assert len(found["0.weight"]) == 16
    assert found["tied"] == found["0.weight"] != found["0.bias"]
    assert found.algorithm == "sums4/1"
    assert repr(found) == f"<Digests of 8 tensors, content {found.content}, version {found.version}>"


def test_they_are_those_of_a_process_of_its_own() -> None:
    with Child(serve, model) as child:
        address = child.recv()
        assert tensorfork.digests(address, timeout=SECONDS) == tensorfork.digests(model())
        child.request("update", 3.0)
        found = tensorfork.digests(address, timeout=SECONDS)
        assert found == tensorfork.digests(model(3.0))
        assert found.generation == 2
        assert child.request("stats").digested == 2
        assert child.request("errors") == []


def test_a_checkpoint_is_compared_by_name(seed: tensorfork.Seed, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = {name: tensor.clone() for name, tensor in tensors.items()}
    assert tensorfork.digests(checkpoint) == of(seed)
    checkpoint["layer.3"][4999] += 1
    wrong, found = tensorfork.digests(checkpoint), of(seed)
    assert [name for name in found if found[name] != wrong[name]] == ["layer.3"]
    assert wrong.content != found.content


def test_some_are_selected_and_the_content_is_of_all(seed: tensorfork.Seed) -> None:
    assert list(of(seed, include=["layer.1", "layer.2"], exclude="layer.2")) == ["layer.1"]
    assert len(of(seed, exclude="*")) == 0
    assert of(seed, include="layer.1").content == of(seed).content == seed.digests().content
    with pytest.raises(ValueError, match="include='nothing' means no tensor of the seed"):
        of(seed, include="nothing")


def test_what_a_seed_leaves_out_has_none() -> None:
    with tensorfork.publish(model(), exclude="layer.0") as seed:
        assert "layer.0" not in of(seed)
        assert of(seed) == seed.digests() == tensorfork.digests(model(), exclude="layer.0")
        assert of(seed).content == tensorfork.digests(model(), exclude="layer.0").content


def test_they_survive_pickle_and_copy(seed: tensorfork.Seed) -> None:
    found = of(seed)
    for other in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found)):
        assert other == found
        assert (other.content, other.version, other.generation) == (found.content, found.version, found.generation)


def test_they_are_computed_once_a_generation_for_everybody(seed: tensorfork.Seed) -> None:
    for _ in range(3):
        of(seed)
        seed.digests()
    tensorfork.fork(seed.address, timeout=SECONDS)
    assert seed.stats().digested == 1


def test_what_is_written_outside_of_updating_is_seen_by_those_of_the_model_alone(
    seed: tensorfork.Seed, tensors: dict[str, torch.Tensor]
) -> None:
    before = of(seed)
    tensors["layer.0"][0] = 9
    assert of(seed) == seed.digests() == before
    assert tensorfork.digests(tensors)["layer.0"] != before["layer.0"]


def test_a_model_under_other_names_has_another_content(seed: tensorfork.Seed) -> None:
    ours = {f"x.{name}": torch.zeros_like(tensor) for name, tensor in model().items()}
    tensorfork.fork_into(ours, seed.address, rename={"x.": ""}, timeout=SECONDS)
    with tensorfork.publish(ours) as relay:
        found = of(relay)
        assert list(found.values()) == list(of(seed).values())
        assert found.content != of(seed).content
        assert found.version is not None
        assert found.version.lineage == seed.version.lineage


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode])
def test_a_mode_of_torch_on_the_caller_s_thread_changes_nothing(mode: Any, tensors: dict[str, torch.Tensor]) -> None:
    before = tensorfork.digests(tensors)
    with tensorfork.publish(tensors) as seed, mode():
        assert tensorfork.digests(tensors) == before
        assert seed.digests() == before
        assert of(seed) == before


# They are asked for under a lease, over no transport.


def test_no_transport_is_needed_and_the_lease_is_given_back(tensors: dict[str, torch.Tensor]) -> None:
    with tensorfork.publish(tensors, transports=[]) as seed:
        assert of(seed) == tensorfork.digests(tensors)
        until(lambda: seed.stats().running == 0, "the lease ends")
        assert list(seed._service._leases._ended.values()) == [RELEASED]
        assert (seed.stats().granted, seed.stats().refused) == (1, 0)
        with pytest.raises(tensorfork.TransportUnavailable, match="it offers: nothing"):
            tensorfork.fork(seed.address, timeout=SECONDS)


def test_identity_and_rank_are_compared(tensors: dict[str, torch.Tensor]) -> None:
    identity, rank = tensorfork.Identity(model="a"), tensorfork.Rank(tp=(0, 2))
    with tensorfork.publish(tensors, identity=identity, rank=rank) as seed:
        of(seed, identity=identity, rank=rank)
        with pytest.raises(tensorfork.IdentityMismatch):
            of(seed, identity=tensorfork.Identity(model="b"))
        with pytest.raises(tensorfork.IdentityMismatch):
            of(seed, rank=tensorfork.Rank(tp=(1, 2)))
        assert seed.stats().granted == 2 - 1


def test_nobody_there_is_unreachable() -> None:
    with pytest.raises(tensorfork.PeerUnreachable):
        tensorfork.digests("tcp://127.0.0.1:1", timeout=0.3)


def test_a_seed_of_another_definition_is_no_seed_to_ask(seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    welcome = SeedService._welcome
    monkeypatch.setattr(SeedService, "_welcome", lambda *args: evolve(welcome(*args), digest="sums9/1"))
    with pytest.raises(tensorfork.ProtocolError, match="the seed's digests are 'sums9/1', ours 'sums4/1'"):
        of(seed)
    assert seed.stats().granted == 0


def test_a_seed_that_drains_refuses(seed: tensorfork.Seed) -> None:
    assert seed.drain(0)
    with pytest.raises(tensorfork.PeerRefused, match="draining"):
        of(seed)
    assert len(seed.digests()) == 8  # its own process may ask


@pytest.mark.parametrize("asked", ["from afar", "in its process"])
class TestWhatHasChanged:
    def ask(self, asked: str, seed: tensorfork.Seed) -> tensorfork.Digests:
        return of(seed) if asked == "from afar" else seed.digests()

    def test_weights_that_are_being_changed(self, asked: str, seed: tensorfork.Seed) -> None:
        with seed.updating(), pytest.raises(tensorfork.SeedChanged, match="being changed"):
            self.ask(asked, seed)

    def test_a_change_that_failed(self, asked: str, seed: tensorfork.Seed) -> None:
        with pytest.raises(ZeroDivisionError), seed.updating():
            raise ZeroDivisionError
        with pytest.raises(tensorfork.SeedChanged, match=r"last change .* failed \(ZeroDivisionError"):
            self.ask(asked, seed)

    def test_a_seed_that_is_suspended(self, asked: str, seed: tensorfork.Seed) -> None:
        seed.suspend()
        with pytest.raises(tensorfork.SeedAsleep):
            self.ask(asked, seed)
        seed.resume()
        assert len(self.ask(asked, seed)) == 8

    def test_tensors_that_moved(self, asked: str, seed: tensorfork.Seed, tensors: dict[str, torch.Tensor]) -> None:
        self.ask(asked, seed)  # that the digests are there already does not matter
        tensors["layer.5"].data = torch.zeros(5000)
        with pytest.raises(tensorfork.SeedMoved) as raised:
            self.ask(asked, seed)
        assert raised.value.tensors == ("layer.5",)

    def test_tensors_that_were_replaced(self, asked: str, seed: tensorfork.Seed, tensors: dict[str, Any]) -> None:
        before = self.ask(asked, seed)
        with seed.updating(version="two"):
            tensors["layer.5"] = torch.zeros(3)
            tensors["more"] = torch.ones(3)
        after = self.ask(asked, seed)
        assert after == tensorfork.digests(tensors)
        assert after.version is not None
        assert (after.version.label, after.version.counter) == ("two", 1)
        assert after.version.content == after.content != before.content

    def test_weights_that_change_while_they_are_computed(
        self, asked: str, seed: tensorfork.Seed, computing: "Computing"
    ) -> None:
        with computing.then(lambda: seed.updating().__enter__()), pytest.raises(tensorfork.SeedChanged):
            self.ask(asked, seed)

    def test_digests_that_cannot_be_computed(
        self, asked: str, seed: tensorfork.Seed, computing: "Computing", caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise RuntimeError("no memory left")

        with computing.then(fail), pytest.raises(tensorfork.PeerRefused, match=r"could not compute .*no memory left"):
            self.ask(asked, seed)
        assert "no memory left" in caplog.text
        assert len(self.ask(asked, seed)) == 8


class Computing:
    """Has something happen once a seed has read all bytes for its digests, and before they are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def then(self, happen: Any) -> Any:
        context = self._monkeypatch.context()
        compute = digests_module.DigestBatch.pieces

        def computing(batch: Any, *args: Any, **options: Any) -> dict[str, Any]:
            found = compute(batch)
            happen()
            return found

        class Patched:
            def __enter__(self) -> None:
                context.__enter__().setattr(digests_module.DigestBatch, "pieces", computing)

            def __exit__(self, *error: Any) -> None:
                context.__exit__(*error)

        return Patched()


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Computing:
    return Computing(monkeypatch)


# In the seed's process.


def test_a_seed_that_is_closed_has_none(seed: tensorfork.Seed) -> None:
    seed.close()
    with pytest.raises(RuntimeError, match="the seed is closed"):
        seed.digests()


def test_closing_a_seed_ends_the_wait_for_its_digests(seed: tensorfork.Seed, computing: Computing) -> None:
    go_on = threading.Event()

    def close() -> None:
        threading.Thread(target=seed.close).start()
        assert go_on.wait(SECONDS)

    with computing.then(close), pytest.raises(RuntimeError, match="the seed is closed"):
        seed.digests()
    go_on.set()
    until(lambda: not any(one.name == "tensorfork-digest" for one in threading.enumerate()), "the thread ends")


def test_suspending_a_seed_ends_the_wait_for_its_digests(seed: tensorfork.Seed, computing: Computing) -> None:
    suspended = threading.Event()

    def suspend() -> None:
        threading.Thread(target=lambda: (seed.suspend(), suspended.set())).start()
        until(lambda: seed.generation % 2 == 1, "the seed is suspended")

    with computing.then(suspend), pytest.raises(tensorfork.SeedAsleep):
        seed.digests()
    assert suspended.wait(SECONDS)


def test_a_want_of_threads_is_an_error_that_passes(seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "tensorfork-digest":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(tensorfork.ResourceExhausted):
            seed.digests()
        with pytest.raises(tensorfork.PeerRefused, match="can't start new thread"):
            of(seed)
    assert of(seed) == seed.digests()


# Of a model.


def test_a_model_without_bytes_has_none() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(tensorfork.UnsupportedTensor, match="weight is on the meta device"):
        tensorfork.digests(module)


@pytest.mark.parametrize("source", [None, 7, ["a"], {"a": 1}])
def test_what_is_neither_a_model_nor_an_address_has_none(source: Any) -> None:
    with pytest.raises(TypeError):
        tensorfork.digests(source)


def test_a_model_is_compared_with_no_identity() -> None:
    with pytest.raises(TypeError, match="a model has none"):
        tensorfork.digests(model(), identity=tensorfork.Identity(model="a"))
