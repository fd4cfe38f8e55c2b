"""What docs/errors.md tells an engine to do after each error: to load from disk, or to be loud."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_errors_travel import example_of

import tensorfork
from tensorfork import errors

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/errors.md"
LOADS = {
    "LeaseEnded",
    "PeerRefused",
    "PeerUnreachable",
    "ProtocolError",
    "SeedAsleep",
    "SeedChanged",
    "SeedMoved",
    "TransferFailed",
    "VerificationFailed",
}
LOUD = {
    "ForkCancelled",
    "IdentityMismatch",
    "LayoutMismatch",
    "MemoryInUse",
    "ResourceExhausted",
    "TransportUnavailable",
    "UnsupportedTensor",
    "ValueMismatch",
    "VersionMismatch",
}
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type)
    and issubclass(kind, tensorfork.TensorForkError)
    and kind is not tensorfork.TensorForkError
}
OTHERS = [ValueError("a bad argument"), RuntimeError("a bug"), KeyboardInterrupt(), MemoryError()]


@pytest.fixture(scope="module")
def load() -> Any:
    """The function of the page."""
    names: dict[str, Any] = {}
    source = PAGE.read_text().split("## In an engine")[1]
    found = re.search(r"^```python\n(.*?)^```", source, re.DOTALL | re.MULTILINE)
    assert found is not None
    exec(compile(found[1], str(PAGE), "exec"), names)
    return names["load"]


class Engine:
    """Builds models, loads the last one, and has a fork that fails."""

    def __init__(self, error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = error
        self.built: list[torch.nn.Module] = []
        self.loaded: list[torch.nn.Module] = []
        monkeypatch.setattr(tensorfork, "fork_into", self.fork_into)

    def fork_into(self, model: Any, address: str, **terms: Any) -> None:
        if self.error is not None:
            raise self.error

    def build(self) -> torch.nn.Module:
        self.built.append(torch.nn.Linear(2, 2))
        return self.built[-1]

    def load_from_disk(self, model: torch.nn.Module) -> None:
        self.loaded.append(model)


def test_it_is_said_of_every_error_what_comes_of_it() -> None:
    assert KINDS.keys() == LOADS | LOUD
    assert not LOADS & LOUD


@pytest.mark.parametrize("name", sorted(LOADS))
def test_what_is_not_the_caller_s_fault_makes_it_load_from_disk(
    load: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = example_of(KINDS[name])
    engine = Engine(error, monkeypatch)
    model = load(engine.build, "tcp://10.0.0.7:4180", engine.load_from_disk)
    assert engine.loaded == [model] == engine.built[-1:]
    assert len(engine.built) == (2 if getattr(error, "undrained", ()) else 1)


@pytest.mark.parametrize(
    "error", [*(example_of(KINDS[name]) for name in sorted(LOUD)), *OTHERS], ids=lambda e: type(e).__name__
)
def test_everything_else_is_loud(load: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(error, monkeypatch)
    with pytest.raises(type(error)) as caught:
        load(engine.build, "tcp://10.0.0.7:4180", engine.load_from_disk)
    assert caught.value is error
    assert engine.loaded == []


def test_a_transfer_that_may_still_write_is_not_loaded_over(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for undrained, models in (((), 1), (((4096, 8),), 2)):
        engine = Engine(tensorfork.TransferFailed("it stopped", undrained=undrained), monkeypatch)
        model = load(engine.build, "tcp://10.0.0.7:4180", engine.load_from_disk)
        assert len(engine.built) == models
        assert engine.loaded == [model]


def test_a_fork_that_works_is_all(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(None, monkeypatch)
    assert [load(engine.build, "tcp://10.0.0.7:4180", engine.load_from_disk)] == engine.built
    assert engine.loaded == []
