"""Whatever a transport raises, the caller gets one of our errors, which says in what state the model is."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_seeds import needs_mooncake
from seed_leases import until

import tensorfork
from tensorfork.testing import Fault, FaultyTransport
from tensorfork.testing.faults import Job
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.transfer_engine import TransferEngine
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow

SECONDS = 30.0
NAMES = ("a", "b", "c")
RAISED: list[Exception] = [
    tensorfork.ProtocolError("half a message"),
    tensorfork.PeerUnreachable("it went away"),
    tensorfork.PeerRefused("it will not"),
    tensorfork.LeaseEnded("the lease has ended"),
    tensorfork.TransferFailed("it stopped", undrained=[(4096, 8)]),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError("no route to host"),
    AssertionError("a bug"),
]
INNER: list[Any] = [
    pytest.param(ZeroMQ, id="zeromq"),
    pytest.param(Gloo, id="gloo"),
    pytest.param(lambda: TransferEngine(fabric="tcp"), id="transfer_engine", marks=needs_mooncake),
]


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((5000,), value) for name in NAMES}


def target(kind: str) -> dict[str, torch.Tensor]:
    with torch.device("meta" if kind == "meta" else "cpu"):
        return model(0.0)


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(model(), transports=["zeromq", "gloo"]) as seed:
        yield seed


class Raises(Fault):
    """Makes the first copy, and then raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def pull(self, job: Job) -> None:
        job.run([0], job.done)
        raise self.error


@pytest.mark.parametrize("kind", ["in place", "meta"])
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_what_a_transport_raises_while_it_copies_is_a_transfer_that_failed(
    seed: tensorfork.Seed, error: Exception, kind: str
) -> None:
    ours = target(kind)
    with pytest.raises(tensorfork.TransferFailed, match=f"{seed.address}: .* 1 of 3 tensors had arrived") as caught:
        tensorfork.fork_into(
            ours, seed.address, device="cpu", transport=FaultyTransport(ZeroMQ(), Raises(error)), timeout=SECONDS
        )
    assert caught.value.__cause__ is error
    assert (str(error) or type(error).__name__) in str(caught.value)
    assert len(caught.value.complete) == 1
    assert caught.value.undrained == getattr(error, "undrained", ())
    for name, tensor in ours.items():
        assert tensor.is_meta if kind == "meta" else bool((tensor == (name in caught.value.complete)).all())
    until(lambda: not seed.stats().running, "the lease is given back")


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("error", [ValueError("stumbled"), tensorfork.TensorForkError("stumbled"), KeyboardInterrupt()])
def test_what_progress_raises_reaches_the_caller_over_every_transport(
    make: Callable[[], tensorfork.Transport], error: BaseException
) -> None:
    def stumble(moved: int, total: int) -> None:
        if moved:
            raise error

    offered = make()
    with tensorfork.publish(model(), transports=[offered]) as seed:
        with pytest.raises(type(error)) as caught:
            tensorfork.fork_into(target("in place"), seed.address, transport=make(), progress=stumble, timeout=SECONDS)
        assert caught.value is error
        until(lambda: not seed.stats().running, "the lease is given back")


def test_an_unavailable_transport_stays_one_so_that_the_next_is_tried(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = FaultyTransport(ZeroMQ(), Raises(tensorfork.TransportUnavailable("a handle cannot be opened")))
    ours = target("in place")
    with pytest.raises(tensorfork.TransportUnavailable, match="zeromq: a handle cannot be opened"):
        tensorfork.fork_into(ours, seed.address, transport=late, timeout=SECONDS)
    monkeypatch.setattr("tensorfork.transports.registry.load", lambda name: {"first": late, "second": Gloo()}[name])
    monkeypatch.setattr("tensorfork.transports.registry.AUTO", ("first", "second"))
    report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
    assert (report.transport, report.verified) == ("gloo", True)


STEPS = ["cover", "facts", "open", "ready"]


def breaking(step: str, error: Exception) -> tensorfork.Transport:
    """A transport that raises at a step of the fork."""

    def fail(*args: Any) -> Any:
        raise error

    if step != "ready":
        return type("Breaks", (ZeroMQ,), {step: fail})()
    opened = ZeroMQ.open

    def open(*args: Any) -> Any:
        session = opened(*args)
        session.ready = fail  # type: ignore[method-assign]
        return session

    return type("Breaks", (ZeroMQ,), {"open": open})()


@pytest.mark.parametrize("step", STEPS)
def test_a_transport_that_breaks_before_it_copies_is_unavailable(seed: tensorfork.Seed, step: str) -> None:
    error, ours = RuntimeError("CUDA error: invalid argument"), target("in place")
    with pytest.raises(tensorfork.TransportUnavailable, match="CUDA error: invalid argument"):
        tensorfork.fork_into(ours, seed.address, transport=breaking(step, error), timeout=SECONDS)
    assert not any(tensor.any() for tensor in ours.values())
    until(lambda: not seed.stats().running, "the lease is given back")


@pytest.mark.parametrize("step", STEPS)
def test_a_transport_that_finds_no_memory_says_so(seed: tensorfork.Seed, step: str) -> None:
    error, ours = torch.OutOfMemoryError("CUDA out of memory"), target("in place")
    with pytest.raises(tensorfork.ResourceExhausted, match="CUDA out of memory") as caught:
        tensorfork.fork_into(ours, seed.address, transport=breaking(step, error), timeout=SECONDS)
    assert caught.value.resource == "memory"
    assert not any(tensor.any() for tensor in ours.values())
    until(lambda: not seed.stats().running, "the lease is given back")


def test_where_one_transport_lacks_memory_another_is_tried(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    hungry = breaking("open", torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr("tensorfork.transports.registry.load", lambda name: {"first": hungry, "second": Gloo()}[name])
    monkeypatch.setattr("tensorfork.transports.registry.AUTO", ("first", "second"))
    ours = target("meta")
    report = tensorfork.fork_into(ours, seed.address, device="cpu", timeout=SECONDS)
    assert report.transport == "gloo"
    assert "no memory left" in report.passed_over["zeromq"]


def test_a_session_that_cannot_be_closed_does_not_spoil_a_fork(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(ZeroMQ):
        def open(self, *args: Any) -> Any:
            session = super().open(*args)
            close = session.close

            def fail(deadline: float) -> None:
                close(deadline)
                raise RuntimeError("stuck")

            session.close = fail  # type: ignore[method-assign]
            return session

    ours = target("in place")
    assert tensorfork.fork_into(ours, seed.address, transport=Stuck(), timeout=SECONDS).verified
    assert "a session was not closed" in caplog.text
