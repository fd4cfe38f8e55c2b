"""A seed's plain values: as they are when a lease is granted, read again only where something may have changed."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from structures import Plain, Slotted, module
from torch import nn

import tensorfork
from tensorfork.model.selection import Selection
from tensorfork.model.values import read_values
from tensorfork.model.walk import walk
from tensorfork.seed import values as seed_values
from tensorfork.seed.values import PublishedValues

TIMEOUT = 20.0


def published(model: nn.Module, *, fixed: bool = False) -> PublishedValues:
    return PublishedValues(walk(model).visited, fixed=fixed)


class Reads:
    """Counts how often the values were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def read(*arguments: Any) -> Any:
            self.count += 1
            return read_values(*arguments)

        monkeypatch.setattr(seed_values, "read_values", read)


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda model: setattr(model, "scale", 0.25),
    "a new attribute": lambda model: setattr(model, "another", 1),
    "an attribute that goes": lambda model: delattr(model, "scale"),
    "an attribute that is renamed": lambda model: model.__dict__.update(other=model.__dict__.pop("last")),
    "an object": lambda model: setattr(model.plain, "x", 3),
    "a slot": lambda model: setattr(model.slotted, "scale", 3),
    "a list": lambda model: model.items.append(4),
    "an element": lambda model: model.items.__setitem__(0, 4),
    "a dict": lambda model: model.table.update(a=2),
    "a set": lambda model: model.names.add("b"),
    "a long list": lambda model: model.long.__setitem__(70, 4),
    "a list in a long list": lambda model: model.long[71].append(4),
    "a vocabulary": lambda model: model.vocabulary.update(word7=8),
    "a word of a vocabulary": lambda model: model.vocabulary.update(other=model.vocabulary.pop("word29999")),
    "a tensor's attribute": lambda model: setattr(model.weight, "note", 4),
}


def example() -> Any:
    model = module(scale=0.5, plain=Plain(x=2), slotted=Slotted(2), items=[1, 2], table={"a": 1})
    model.names, model.long = {"a"}, [*range(70), 70, [1, 2]]
    model.weight = nn.Parameter(torch.zeros(1))
    model.weight.note = 3
    model.vocabulary = {f"word{i}": i for i in range(30_000)}
    model.last = None
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_read_again_and_what_has_not_is_not(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    model = example()
    reads, values = Reads(monkeypatch), published(model)
    first = values.packed()
    assert values.packed() is first
    assert reads.count == 1
    CHANGES[change](model)
    second = values.packed()
    assert second is not None
    assert first is not None
    assert second.pages != first.pages
    assert values.packed() is second
    assert reads.count == 2


def test_what_does_not_show_its_changes_is_read_each_time() -> None:
    numpy = pytest.importorskip("numpy")
    array, cell = numpy.zeros(3), [0.5]
    for model, change in (
        (module(a=array), lambda: array.__setitem__(0, 1)),
        (module(f=functools.partial(round, Plain(x=cell))), lambda: cell.__setitem__(0, 1.5)),
    ):
        values = published(model)
        first = values.packed()
        change()
        second = values.packed()
        assert first is not None
        assert second is not None
        assert first.pages != second.pages


@pytest.mark.parametrize("made", ["published", "snapshot"])
def test_a_fork_gets_the_values_of_when_the_lease_was_granted_or_the_snapshot_taken(made: str) -> None:
    model = module(scale=1.0, weight=nn.Parameter(torch.zeros(1)))
    with tensorfork.publish(model, snapshot=made == "snapshot") as seed:
        model.scale = 2.0
        report = tensorfork.fork_into(module(scale=3.0, weight=torch.zeros(1)), seed.address, timeout=TIMEOUT)
        assert report.values is not None
        assert [one.seed for one in report.values.different] == ["2.0" if made == "published" else "1.0"]


def test_objects_that_come_with_an_update_are_read() -> None:
    model, into = module(weight=nn.Parameter(torch.zeros(1))), module(weight=torch.zeros(1), new=Plain(x=1))
    with tensorfork.publish(model) as seed:
        with seed.updating():
            model.new = Plain(x=2)
        report = tensorfork.fork_into(into, seed.address, timeout=TIMEOUT)
        assert report.values is not None
        assert [str(one) for one in report.values.different] == ["x: 1 value new.x: 2 in the seed, 1 here"]


REPLACED: dict[str, Callable[[Any], object]] = {
    "a list": lambda model: setattr(model, "items", [1, 5]),
    "a dict": lambda model: setattr(model, "table", {"a": 5}),
    "an object": lambda model: setattr(model, "plain", Plain(x=5)),
    "a list in a list": lambda model: model.nested.__setitem__(0, [5]),
    "an object of a slot": lambda model: setattr(model.slotted, "scale", Plain(x=5)),
}


@pytest.mark.parametrize("update", ["values only", "none"])
@pytest.mark.parametrize("what", REPLACED)
def test_what_takes_an_object_s_place_is_read_though_the_model_was_not_walked_again(what: str, update: str) -> None:
    def built() -> Any:
        model = example()
        model.nested, model.slotted.scale = [[1]], Plain(x=1)
        return model

    model, same = built(), built()
    REPLACED[what](same)
    with tensorfork.publish(model) as seed:
        for _ in range(2):  # once before the values were ever read, and once after
            with seed.updating(values_only=True) if update == "values only" else nullcontext():
                REPLACED[what](model)
            for into, count in ((same, 0), (built(), 1)):
                report = tensorfork.fork_into(into, seed.address, timeout=TIMEOUT)
                assert report.values is not None
                assert len(report.values.different) == count


def test_a_bytearray_that_is_written_is_read_again() -> None:
    model = module(mask=bytearray(b"a"))
    values = published(model)
    first = values.packed()
    model.mask[:] = b"b"
    second = values.packed()
    assert first is not None
    assert second is not None
    assert first.pages != second.pages


def test_what_was_excluded_does_not_have_the_model_walked_for_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    model = example()
    values = PublishedValues(walk(model, Selection(exclude=("items", "plain"))).visited, fixed=False)
    reads = Reads(monkeypatch)
    assert values.packed() is not None
    assert reads.count == 1


def test_a_snapshot_does_not_refer_to_the_model() -> None:
    model = example()
    values = published(model, fixed=True)
    first = values.packed()
    model.scale = 7.0
    assert values.packed() is first
    assert values._visited is None


def test_values_that_cannot_be_read_are_not_compared_and_the_fork_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("changed during iteration")

    monkeypatch.setattr(seed_values, "read_values", fail)
    with tensorfork.publish(module(scale=1.0, weight=nn.Parameter(torch.ones(1)))) as seed:
        into = module(scale=2.0, weight=torch.zeros(1))
        report = tensorfork.fork_into(into, seed.address, timeout=TIMEOUT)
    assert into.weight.item() == 1.0
    assert "values" in report.not_compared
    assert "cannot be read" in caplog.text


def test_what_was_compared_under_an_earlier_lease_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change under the first lease, and the seed cannot read its values for the second."""
    model, into = module(scale=1.0, weight=nn.Parameter(torch.ones(1))), module(scale=2.0, weight=torch.zeros(1))
    packed, leases = PublishedValues.packed, 0

    def first_alone(self: PublishedValues) -> Any:
        nonlocal leases
        leases += 1
        return packed(self) if leases == 1 else None

    def change_once(done: int, total: int) -> None:
        if leases == 1:
            with seed.updating(values_only=True), torch.no_grad():
                model.weight.add_(1)

    monkeypatch.setattr(PublishedValues, "packed", first_alone)
    with tensorfork.publish(model) as seed:
        policy = tensorfork.ValuePolicy(take="scale")
        report = tensorfork.fork_into(
            into, seed.address, timeout=TIMEOUT, restarts=3, progress=change_once, values=policy
        )
    assert (report.restarts, leases) == (1, 2)
    assert report.values is None
    assert "values" in report.not_compared
    assert into.scale == 2.0


def test_two_seeds_have_different_salts() -> None:
    model = module(text="a text")
    one, other = published(model).packed(), published(model).packed()
    assert one is not None
    assert other is not None
    assert one.salt != other.salt
    assert one.pages != other.pages
