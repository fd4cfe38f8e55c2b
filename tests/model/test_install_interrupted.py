"""An installation is all or none: whatever interrupts it, after whichever instruction."""

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from subclasses import Pair
from torch import nn

from tensorfork import UnsupportedTensor
from tensorfork.fork.destination import Destination, memory_for, tensors_of_model
from tensorfork.fork.match import match
from tensorfork.model import install
from tensorfork.model.describe import describe
from tensorfork.model.value_writes import ValueWrite, prepare_write


class Loaded(nn.Parameter):
    """Like an engine's parameters: it has attributes for loading, in a slot and in its dictionary."""

    __slots__ = ("rank",)


class Model(nn.Module):
    """A tensor of each kind; every element is the number."""

    def __init__(self, number: int, device: str) -> None:
        super().__init__()
        value = float(number)
        with torch.device(device):
            self.weight = nn.Parameter(torch.full((6, 4), value))
            self.tied = self.weight
            self.loaded = Loaded(torch.full((3,), value), requires_grad=False)
            self.loaded.rank, self.loaded.loader = 3, Model
            self.register_buffer("table", torch.full((8,), value))
            with torch.no_grad():
                self.half, self.row = self.table[4:], self.weight[1]
            self.derived = self.weight[2]
            self.quantized = Pair(torch.full((3, 4), number, dtype=torch.int8), torch.full((1,), value))
            self.scale = self.quantized.scale
            self.parameter = nn.Parameter(Pair(torch.full((2,), value), torch.full((1,), value)), requires_grad=True)
        self.weak = [weakref.ref(self.weight)]
        self.factor = 1.0

    def plain(self) -> list[torch.Tensor]:
        pairs = [part for pair in (self.quantized, self.parameter) for part in (pair.data_, pair.scale)]
        return [self.weight, self.loaded, self.table, self.half, self.row, self.derived, *pairs]

    def all(self) -> list[torch.Tensor]:
        return [*self.plain(), self.quantized, self.parameter]

    def devices(self) -> set[str]:
        return {tensor.device.type for tensor in self.all()}

    def check(self, device: str, number: int) -> None:
        """Everything is on that device, is what it was, and has the same memory in common."""
        assert self.devices() == {device}
        assert self.tied is self.weight is self.weak[0]()
        assert self.scale is self.quantized.scale
        assert (type(self.loaded), self.loaded.rank, self.loaded.loader) == (Loaded, 3, Model)
        assert set(self.loaded.__dict__) == {"loader"}
        assert self.quantized.note == {"bits": 8}
        assert [tensor.requires_grad for tensor in (self.weight, self.loaded, self.parameter)] == [True, False, True]
        views = [(self.half, self.table, 4), (self.row, self.weight, 4), (self.derived, self.weight, 8)]
        for view, base, offset in views:
            assert view.untyped_storage()._cdata == base.untyped_storage()._cdata
            assert view.storage_offset() == base.storage_offset() + offset
        if device == "cpu":
            assert all(bool((tensor == number).all()) for tensor in self.plain())


SEED = describe(Model(3, "cpu"))


def ready(model: Model) -> Destination:
    """All that comes before the installation; the bytes have arrived."""
    seed, ours = SEED, describe(model)
    memory = memory_for(match(seed.layout, ours.layout), seed.layout, ours, None)
    destination = tensors_of_model(ours, memory)
    with torch.no_grad():
        for name, tensor in destination.tensors.items():
            tensor.copy_(seed.tensors[name])
    return destination


def writes(model: Model) -> list[ValueWrite]:
    """A value that becomes the seed's together with the tensors."""
    write = prepare_write((model, "factor", True), 2.5)
    assert isinstance(write, ValueWrite)
    return [write]


def at_opcodes(call: Callable[[], None], at_opcode: Callable[[int], None]) -> None:
    """Call `at_opcode` with a count before every instruction of Python's that runs inside of the call."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            at_opcode(count)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


def test_before_every_instruction_all_tensors_are_on_the_meta_device_or_none_is() -> None:
    model = Model(0, "meta")
    destination = ready(model)
    values = writes(model)
    seen: list[set[Any]] = []
    at_opcodes(lambda: destination.install(values), lambda _: seen.append({*model.devices(), model.factor}))
    assert all(states in ({"meta", 1.0}, {"cpu", 2.5}) for states in seen)
    assert (seen[0], seen[-1]) == ({"meta", 1.0}, {"cpu", 2.5})
    model.check("cpu", 3)


class Interrupt(BaseException):
    """As KeyboardInterrupt is raised: anywhere."""


def test_an_exception_at_any_instruction_leaves_all_or_none_and_the_model_can_be_installed_after_it() -> None:
    outcomes: list[str] = []
    finished = False
    while not finished:
        model = Model(0, "meta")
        destination = ready(model)

        def interrupt(count: int, when: int = len(outcomes) + 1) -> None:
            if count == when:
                raise Interrupt

        try:
            values = writes(model)
            at_opcodes(lambda to=destination, values=values: to.install(values), interrupt)
            finished = True
        except Interrupt:
            outcomes.append(*model.devices())
            model.check(outcomes[-1], 3)
            assert model.factor == {"meta": 1.0, "cpu": 2.5}[outcomes[-1]]
            if outcomes[-1] == "meta":
                again = destination if len(outcomes) % 5 else ready(model)
                again.install()
        model.check("cpu", 3)
    (model.weight * 2).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((6, 4), 2.0))
    assert outcomes == sorted(outcomes, key=["meta", "cpu"].index), "once it has memory it keeps it"
    assert set(outcomes) == {"meta", "cpu"}


@pytest.mark.parametrize("done", range(13))
def test_what_was_swapped_when_a_swap_failed_is_swapped_back(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """It cannot fail half way, as all were tried; this is the second line of defence."""
    model = Model(0, "meta")
    destination = ready(model)
    calls: list[int] = []
    swap_all = install._swap_all

    def fail_half_way(swaps: Any, writes: Any = ()) -> None:
        calls.append(len(swaps))
        if len(calls) == 2:
            swap_all(swaps[:done], writes)
            raise KeyboardInterrupt
        swap_all(swaps, writes)

    monkeypatch.setattr(install, "_swap_all", fail_half_way)
    with pytest.raises(KeyboardInterrupt):
        destination.install(writes(model))
    assert calls[1:] == [12, min(done, 12)]
    model.check("meta", 0)
    assert model.factor == 1.0
    destination.install(writes(model))
    model.check("cpu", 3)
    assert model.factor == 2.5


@pytest.mark.parametrize("which", ["weight", "half", "scale", "quantized"])
def test_a_weak_reference_of_torch_s_own_is_refused_and_all_are_as_they_were(which: str) -> None:
    model = Model(0, "meta")
    destination = ready(model)
    held = torch._C._WeakTensorRef(getattr(model, which))
    name = r"quantized\.scale" if which == "scale" else which
    with pytest.raises(UnsupportedTensor, match=rf"^{name} cannot take its memory in place: .*weak"):
        destination.install()
    model.check("meta", 0)
    del held
    destination.install()
    model.check("cpu", 3)


def test_a_graph_that_was_made_on_the_meta_device_cannot_be_run_backward_after_it() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(3, device="meta"))
    seed, ours = describe({"weight": torch.ones(3)}), describe(model)
    destination = tensors_of_model(ours, memory_for(match(seed.layout, ours.layout), seed.layout, ours, None))
    loss = (model.weight * 2).sum()
    destination.install()
    with pytest.raises(RuntimeError, match="made while the tensor was on the meta device"):
        loss.backward()
    assert model.weight.grad is None
    model.weight.sum().backward()
    assert torch.equal(model.weight.grad, torch.ones(3))
