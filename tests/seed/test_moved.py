"""A seed publishes a model, not addresses: what moves is published anew, or refused, and never served as it was."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from moving_models import MOVES, Attention, freed, tensors, values
from seed_leases import SECONDS, check, connected, soon, take, until
from torch import nn

import tensorfork
from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.definition import Pieces
from tensorfork.model import describe as describe_module
from tensorfork.seed import look
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages

moves = pytest.mark.parametrize("move", MOVES)


@moves
def test_what_moves_while_the_model_is_updated_is_published_as_it_is_then(move: str) -> None:
    model, ours = Attention(1.0), Attention(0.0)
    with tensorfork.publish(model) as seed:
        with seed.updating():
            MOVES[move][0](model)
        report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
        assert report.verified
        assert values(ours) == values(model)


@moves
def test_what_moves_otherwise_is_refused_until_the_seed_is_told(move: str) -> None:
    model, ours = Attention(1.0), Attention(0.0)
    do, name = MOVES[move]
    with tensorfork.publish(model) as seed:
        do(model)
        with pytest.raises(tensorfork.SeedMoved, match=r"rescan\(\)") as raised:
            tensorfork.fork_into(ours, seed.address, timeout=SECONDS, restarts=1000)
        assert name in raised.value.tensors
        assert set(values(ours).values()) == {0.0}
        seed.rescan()
        tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
        assert values(ours) == values(model)


@pytest.mark.parametrize(
    ("change", "seen"),
    [(lambda data: data.t(), True), (lambda data: data.view(torch.int32), True), (lambda data: data.view(2, 8), False)],
    ids=["transposed", "another dtype", "another shape"],
)
def test_a_tensor_that_became_another_over_the_same_memory_is_published_anew(
    change: Callable[[torch.Tensor], torch.Tensor], seen: bool
) -> None:
    model = {"a": torch.arange(16.0).view(4, 4)}
    with tensorfork.publish(model) as seed:
        model["a"].data = change(model["a"].data)
        if seen:
            with pytest.raises(tensorfork.SeedMoved, match="a: its shape, its strides or its dtype"):
                tensorfork.fork(seed.address, timeout=SECONDS)
        seed.rescan()
        found = tensorfork.fork(seed.address, timeout=SECONDS)["a"]
        assert (found.dtype, found.shape, found.stride()) == (
            model["a"].dtype,
            model["a"].shape,
            model["a"].stride(),
        )
        assert torch.equal(found, model["a"])


def test_a_model_that_nothing_happened_to_is_not_refused() -> None:
    model = Attention(1.0)
    with tensorfork.publish(model) as seed:
        model.kv_b(torch.ones(1, model.kv_b.in_features))
        for _ in range(2):
            tensorfork.fork_into(Attention(0.0), seed.address, timeout=SECONDS)


def test_tensors_that_come_and_go_are_published_and_forgotten() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(5))})
    with tensorfork.publish(model) as seed:
        with seed.updating():
            model["b"] = nn.Parameter(torch.full((3,), 2.0))
            del model["a"]
        found = tensorfork.fork(seed.address, timeout=SECONDS)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {"b": [2.0] * 3}
        assert [tensor.name for tensor in seed.layout.tensors] == ["b"]


def test_a_mapping_is_looked_at_anew_in_the_same_way() -> None:
    model = {"a": torch.ones(5), "b": torch.ones(5)}
    with tensorfork.publish(model) as seed:
        model["a"] = torch.full((5,), 2.0)
        with pytest.raises(tensorfork.SeedMoved, match="a: the model holds another object") as raised:
            tensorfork.fork(seed.address, timeout=SECONDS)
        assert raised.value.tensors == ("a",)
        del model["b"]
        seed.rescan()
        found = tensorfork.fork(seed.address, timeout=SECONDS)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [2.0] * 5}


def test_what_is_replaced_in_a_long_list_of_modules_is_named_and_what_is_added_there_is_not() -> None:
    model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3 * look.LONG)])
    with tensorfork.publish(model) as seed:
        model._modules["other"] = None
        assert len(tensorfork.fork(seed.address, timeout=SECONDS)) == 3 * look.LONG
        model[7] = nn.Linear(2, 2, bias=False)
        with pytest.raises(tensorfork.SeedMoved) as raised:
            tensorfork.fork(seed.address, timeout=SECONDS)
        assert raised.value.tensors == ("7",)


def test_what_is_excluded_may_move_as_it_likes() -> None:
    model = Attention(1.0)
    with tensorfork.publish(model, exclude=["scales", "absorbed", "out"]) as seed:
        for move in ("a new list", "a derived attribute made anew", "a new module"):
            MOVES[move][0](model)
        found = tensorfork.fork(seed.address, timeout=SECONDS)
        assert found.keys() == {"kv_b.weight", "scale", "tables['rope']"}


def test_a_model_of_which_something_was_freed_is_refused_with_the_reason() -> None:
    model = Attention(1.0)
    with tensorfork.publish(model) as seed:
        with pytest.raises(tensorfork.UnsupportedTensor, match=r"kv_b.weight: .* freed or shrunk"), seed.updating():
            freed(model)
        with pytest.raises(tensorfork.SeedChanged, match=r"failed \(UnsupportedTensor: kv_b.weight"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        with seed.updating():
            for tensor in tensors(model).values():
                tensor.untyped_storage().resize_(tensor.nbytes)
            model.fill(2.0)
        ours = Attention(0.0)
        tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
        assert set(values(ours).values()) == {2.0}


@pytest.mark.parametrize("function", ["publish", "fork_into"])
def test_tensors_without_their_memory_are_neither_published_nor_filled(function: str) -> None:
    model = Attention(1.0)
    with tensorfork.publish(Attention(1.0)) as seed:
        freed(model)
        with pytest.raises(tensorfork.UnsupportedTensor, match=r"kv_b.weight: .* freed or shrunk"):
            tensorfork.publish(model) if function == "publish" else tensorfork.fork_into(model, seed.address)


def test_promised_values_only_are_not_walked_for_and_addresses_are_looked_at_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, walks = Attention(1.0), 0
    walk = describe_module.walk

    def counted(*args: object, **options: object) -> object:
        nonlocal walks
        walks += 1
        return walk(*args, **options)  # type: ignore[arg-type]

    with tensorfork.publish(model) as seed:
        monkeypatch.setattr(describe_module, "walk", counted)
        with seed.updating(values_only=True), torch.no_grad():
            model.scale.fill_(3.0)
        assert walks == 0
        assert tensorfork.fork(seed.address, timeout=SECONDS)["scale"][0, 0] == 3.0
        with pytest.raises(tensorfork.SeedMoved, match=r"kv_b\.weight"), seed.updating(values_only=True):
            MOVES["a new parameter"][0](model)
        with pytest.raises(tensorfork.SeedChanged, match=r"failed \(SeedMoved"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        with seed.updating(values_only=True):  # what is left of the change before is looked at as well
            pass
        assert walks == 1
        assert tensorfork.fork(seed.address, timeout=SECONDS)["kv_b.weight"][0, 0] == 2.0


def test_one_of_two_that_update_at_once_may_replace_tensors() -> None:
    model = Attention(1.0)
    with tensorfork.publish(model) as seed:
        with seed.updating(), seed.updating(values_only=True):
            MOVES["a new parameter"][0](model)
        assert tensorfork.fork(seed.address, timeout=SECONDS)["kv_b.weight"][0, 0] == 2.0


def test_a_walk_that_another_change_overtook_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"a": torch.ones(5)}
    walk, walking, go_on = describe_module.walk, threading.Event(), threading.Event()

    def slow(*args: object, **options: object) -> object:
        found = walk(*args, **options)  # type: ignore[arg-type]
        if threading.current_thread() is not threading.main_thread():
            walking.set()
            assert go_on.wait(SECONDS)
        return found

    with tensorfork.publish(model) as seed:
        monkeypatch.setattr(describe_module, "walk", slow)
        slower = threading.Thread(target=seed.rescan)
        slower.start()
        assert walking.wait(SECONDS)
        with seed.updating():
            model["a"] = torch.full((7,), 2.0)
        assert seed.generation % 2 == 0
        go_on.set()
        slower.join()
        assert seed.generation % 2 == 0
        assert tensorfork.fork(seed.address, timeout=SECONDS)["a"].tolist() == [2.0] * 7


def test_leases_on_what_was_replaced_end_and_its_memory_is_free() -> None:
    model = {"a": torch.ones(1000)}
    with tensorfork.publish(model) as seed, connected(seed.address) as conversation:
        tensorfork.fork(seed.address, timeout=SECONDS)  # so that everything that is kept between forks is there
        lease = take(conversation, digests=True)
        old = weakref.ref(model["a"])
        with seed.updating():
            model["a"] = torch.zeros(1000)
        until(lambda: seed.stats().running == 0, "the lease ends")
        gc.collect()
        until(lambda: old() is None, "nothing refers to the tensor")
        with pytest.raises(tensorfork.SeedChanged, match="published other tensors"):
            conversation.request(messages.CheckLease(lease.lease, False), messages.Checked, soon(), "check")


def test_a_lease_goes_on_when_only_values_changed_and_its_fork_hears_of_it() -> None:
    model = {"a": torch.ones(1000)}
    with tensorfork.publish(model) as seed, connected(seed.address) as conversation:
        lease = take(conversation)
        with seed.updating():
            model["a"].fill_(2.0)
        assert check(conversation, lease.lease) == 2 == lease.generation + 2
        assert seed.stats().running == 1


def test_a_fork_that_begins_again_matches_what_is_published_then() -> None:
    """The layout that it was sent is of tensors that are no more when it takes its lease."""
    model, replaced = {"a": torch.ones(1000)}, False

    class Replacing(ZeroMQ):
        def facts(self, regions: object) -> dict[str, object]:
            nonlocal replaced
            if not replaced and threading.current_thread() is threading.main_thread():
                replaced = True
                with seed.updating():
                    model["a"] = torch.full((7,), 2.0)
            return dict(super().facts(regions))  # type: ignore[arg-type]

    with tensorfork.publish(model) as seed:
        with pytest.raises(tensorfork.SeedChanged, match="published other tensors"):
            tensorfork.fork(seed.address, transport=Replacing(), timeout=SECONDS)
        replaced = False
        with seed.updating():
            model["a"] = torch.ones(1000)
        found = tensorfork.fork(seed.address, transport=Replacing(), timeout=SECONDS, restarts=1)
        assert found["a"].tolist() == [2.0] * 7


def test_a_digest_of_memory_that_moved_meanwhile_is_never_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"a": torch.ones(100_000), "b": torch.ones(5)}
    pieces = DigestBatch.pieces

    def moving(batch: DigestBatch, *args: object, **options: object) -> dict[str, Pieces]:
        found = pieces(batch, *args, **options)  # type: ignore[arg-type]
        if threading.current_thread().name == "tensorfork-digest":
            model["a"].data = torch.zeros(100_000)
        return found

    monkeypatch.setattr(DigestBatch, "pieces", moving)
    with tensorfork.publish(model) as seed, connected(seed.address) as conversation:
        lease = take(conversation)
        request = messages.GetDigests(lease.lease)
        with pytest.raises(tensorfork.SeedMoved, match="a: it has other memory"):
            conversation.request(request, messages.Digests, soon(), "digests")
        assert seed.version.content is None


def test_looking_at_a_model_reads_no_memory_and_gives_the_interpreter_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {f"t{i}": torch.empty(0).set_(torch.empty(4).untyped_storage(), 0, (4,)) for i in range(5000)}
    pauses = 0

    def sleep(seconds: float) -> None:
        nonlocal pauses
        pauses += 1

    with tensorfork.publish(model) as seed:
        monkeypatch.setattr(look.time, "sleep", sleep)
        seed._service.model.publication.places.check()
        assert pauses >= 2 * (len(model) // look.STEP - 1)
