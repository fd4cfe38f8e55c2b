"""Whatever a transport does wrong, a fork is right or an error that says what is wrong, and with which tensors."""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorfork
from tensorfork.testing import Fault, FaultyTransport, faults
from tensorfork.testing.faults import Job
from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow

SECONDS = 20.0
PIECE = 1 << 15


class Net(torch.nn.Module):
    """Tensors of a few pieces and of one, of several dtypes, tied ones, and one in too many stretches to be fetched one
    by one.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        self.big = torch.nn.Parameter(noise(100, 257))
        self.bf16 = torch.nn.Parameter(noise(33, 100).to(torch.bfloat16))
        self.frozen = torch.nn.Parameter(noise(3000), requires_grad=False)
        self.tied = torch.nn.Parameter(noise(120, 50))
        self.again = self.tied
        self.register_buffer("count", torch.tensor(3 + seed))
        self.register_buffer("mask", noise(5000) > 0, persistent=False)
        self.register_buffer("strided", noise(4000, 6)[:, ::2])


def target(kind: str) -> Net:
    if kind == "meta":
        with torch.device("meta"):
            return Net()
    return Net(1)


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(Net(0), transports=["zeromq"]) as seed:
        yield seed


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def differing(model: torch.nn.Module) -> set[str]:
    want = tensors(Net(0))
    return {name for name, tensor in tensors(model).items() if not torch.equal(tensor, want[name])}


def copies_of(seed: tensorfork.Seed) -> list[int]:
    """The sizes of the copies that a fork of the model asks for, in order."""
    found: list[int] = []

    class Look(Fault):
        def pull(self, job: Job) -> None:
            found.extend(copy.nbytes for copy in job.copies)
            super().pull(job)

    tensorfork.fork_into(target("filled"), seed.address, transport=faulty(Look()), timeout=SECONDS)
    return found


def faulty(fault: Fault) -> FaultyTransport:
    return FaultyTransport(ZeroMQ(), fault, piece=PIECE)


class Remember(dict[str, Any]):
    """What a model was like before: its objects, and all about them that a failure must not change."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(
            {
                name: (id(t), type(t), t.device, t.dtype, t.shape, t.stride(), t.requires_grad)
                for name, t in tensors(model).items()
            }
        )


# Corruption is found.

CORRUPTIONS = [
    faults.Flip(),
    faults.Flip(copy=1, byte=777, bit=7),
    faults.Flip(copy=3, byte=2000, bit=3),
    faults.LateFlip(copy=2, byte=5),
    faults.SwapWords(),
    faults.SwapWords(copy=1, first=10, second=1034),
    faults.SwapCopies(0, 1),
    faults.SwapCopies(1, 4),
    faults.SwapCopies(0, 6),
    faults.ZeroPage(),
    faults.ZeroPage(copy=1, page=3),
    faults.StalePage(),
    faults.StalePage(copy=3, page=1, nbytes=512),
    faults.Shift(),
    faults.Shift(copy=1, by=-8),
    faults.Shift(copy=2, by=4096),
    faults.Drop(),
    faults.Drop(copy=3),
]
# Fresh memory may be what an earlier fork gave back, with the right bytes in it.
IN_FRESH_MEMORY = [fault for fault in CORRUPTIONS if not isinstance(fault, faults.Drop | faults.StalePage)]


@pytest.mark.parametrize("fault", CORRUPTIONS, ids=str)
def test_corruption_is_found_and_the_spoiled_tensors_are_named(seed: tensorfork.Seed, fault: Fault) -> None:
    model = target("filled")
    before = Remember(model)
    with pytest.raises(tensorfork.VerificationFailed) as caught:
        tensorfork.fork_into(model, seed.address, transport=faulty(fault), timeout=SECONDS)
    assert set(caught.value.tensors) == differing(model) != set()
    assert all(name in str(caught.value) for name in caught.value.tensors)
    assert Remember(model) == before


@pytest.mark.parametrize("fault", IN_FRESH_MEMORY, ids=str)
def test_a_meta_model_stays_meta_when_corruption_is_found(seed: tensorfork.Seed, fault: Fault) -> None:
    model = target("meta")
    before = Remember(model)
    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork_into(model, seed.address, transport=faulty(fault), device="cpu", timeout=SECONDS)
    assert all(tensor.is_meta for tensor in tensors(model).values())
    assert Remember(model) == before
    report = tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    assert report.verified
    assert differing(model) == set()
    assert model.again is model.tied


@pytest.mark.parametrize("fault", IN_FRESH_MEMORY[::3], ids=str)
def test_nothing_is_returned_when_corruption_is_found(seed: tensorfork.Seed, fault: Fault) -> None:
    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork(seed.address, transport=faulty(fault), timeout=SECONDS)


def test_every_bit_counts(seed: tensorfork.Seed) -> None:
    sizes = copies_of(seed)

    @settings(max_examples=80)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        copy = data.draw(st.integers(0, len(sizes) - 2))  # the last one is scratch, and has gaps
        byte, bit = data.draw(st.integers(0, sizes[copy] - 1)), data.draw(st.integers(0, 7))
        model = target("filled")
        fault = faults.Flip(copy, byte, bit)
        if model.mask.numel() == sizes[copy]:
            bit = 0  # another bit makes a bool that is neither true nor false
        with pytest.raises(tensorfork.VerificationFailed) as caught:
            tensorfork.fork_into(model, seed.address, transport=faulty(fault), timeout=SECONDS)
        assert len(set(caught.value.tensors) - {"again"}) == 1

    check()


def test_corruption_on_the_way_through_scratch_is_found(seed: tensorfork.Seed) -> None:
    last = len(copies_of(seed)) - 1
    for byte, matters in ((0, True), (8 * 999, True), (8 * 999 + 4, False)):  # every other float is a gap
        model = target("filled")
        transport = faulty(faults.Flip(last, byte, 6))
        if matters:
            with pytest.raises(tensorfork.VerificationFailed) as caught:
                tensorfork.fork_into(model, seed.address, transport=transport, timeout=SECONDS)
            assert caught.value.tensors == ("strided",)
        else:
            tensorfork.fork_into(model, seed.address, transport=transport, timeout=SECONDS)
            assert differing(model) == set()


def test_both_names_of_a_tied_tensor_are_named(seed: tensorfork.Seed) -> None:
    sizes = copies_of(seed)
    tied = sizes.index(120 * 50 * 4)
    with pytest.raises(tensorfork.VerificationFailed) as caught:
        tensorfork.fork_into(target("filled"), seed.address, transport=faulty(faults.Flip(tied)), timeout=SECONDS)
    assert set(caught.value.tensors) == {"tied", "again"}


def test_whoever_does_not_verify_gets_what_came_and_is_told(seed: tensorfork.Seed) -> None:
    model = target("filled")
    report = tensorfork.fork_into(model, seed.address, transport=faulty(faults.Flip()), verify=False, timeout=SECONDS)
    assert not report.verified
    assert "NOT verified" in str(report)
    assert len(differing(model)) == 1


def test_a_model_is_good_again_after_the_next_fork(seed: tensorfork.Seed) -> None:
    model = target("filled")
    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork_into(model, seed.address, transport=faulty(faults.SwapCopies(0, 4)), timeout=SECONDS)
    tensorfork.fork_into(model, seed.address, timeout=SECONDS)
    assert differing(model) == set()


# What does not come is said, and what is said to be complete is.


def stopped(seed: tensorfork.Seed, fault: Fault, timeout: float = SECONDS) -> tensorfork.TransferFailed:
    """The fork fails; what it says is complete is, and what is not has not been said to be."""
    for kind in ("filled", "meta"):
        model = target(kind)
        before = Remember(model)
        started = time.monotonic()
        with pytest.raises(tensorfork.TransferFailed) as caught:
            tensorfork.fork_into(model, seed.address, transport=faulty(fault), device="cpu", timeout=timeout)
        assert time.monotonic() - started < 5 * (timeout + 1)
        assert Remember(model) == before
        assert len(set(caught.value.complete)) == len(caught.value.complete)
        assert set(caught.value.complete) <= tensors(model).keys()
        if kind == "filled":
            assert not set(caught.value.complete) & differing(model)
        assert seed.address in str(caught.value)
    return caught.value


@pytest.mark.parametrize("copy", [0, 2, 5])
def test_a_copy_that_is_never_reported_fails_the_fork(seed: tensorfork.Seed, copy: int) -> None:
    error = stopped(seed, faults.Drop(copy=copy, reported=False))
    assert "copies" in str(error)
    assert 0 < len(error.complete) < len(tensors(target("meta")))


@pytest.mark.parametrize("nbytes", [0, PIECE, 4 * PIECE, 150_000])
def test_a_transfer_that_stops_ends_at_the_deadline_and_names_what_is_complete(
    seed: tensorfork.Seed, nbytes: int
) -> None:
    error = stopped(seed, faults.StopAfter(nbytes), timeout=0.5)
    assert bool(error.complete) == (nbytes > 102_800)  # the first tensor is `big`


def test_what_is_empty_is_complete_and_what_never_began_is_not() -> None:
    model = {"nothing": torch.empty(0, 5), "some": torch.zeros(5000)}
    with tensorfork.publish(model, transports=["zeromq"]) as seed:
        into = {name: torch.ones_like(tensor) for name, tensor in model.items()}
        with pytest.raises(tensorfork.TransferFailed) as caught:
            tensorfork.fork_into(into, seed.address, transport=faulty(faults.StopAfter(0)), timeout=0.5)
        assert set(caught.value.complete) <= {"nothing"}
        assert torch.equal(into["some"], torch.ones(5000))


def test_a_copy_reported_twice_fails_the_fork(seed: tensorfork.Seed) -> None:
    class Twice(Fault):
        def pull(self, job: Job) -> None:
            super().pull(job)
            job.done(0)

    stopped(seed, Twice())


def test_a_copy_reported_in_place_of_another_fails_the_fork(seed: tensorfork.Seed) -> None:
    class Another(Fault):
        def pull(self, job: Job) -> None:
            job.run(range(len(job.copies)), lambda i: job.done(max(i, 1)))

    stopped(seed, Another())


def test_a_transport_that_comes_late_is_waited_for_until_the_deadline(seed: tensorfork.Seed) -> None:
    stopped(seed, faults.Delay(60.0), timeout=0.5)
    model = target("filled")
    tensorfork.fork_into(model, seed.address, transport=faulty(faults.Delay(0.05)), timeout=SECONDS)
    assert differing(model) == set()


def test_a_progress_callback_that_raises_ends_the_fork_with_its_error(seed: tensorfork.Seed) -> None:
    def stumble(moved: int, total: int) -> None:
        if moved:
            raise KeyboardInterrupt

    for kind in ("filled", "meta"):
        model = target(kind)
        before = Remember(model)
        with pytest.raises(KeyboardInterrupt):
            tensorfork.fork_into(model, seed.address, device="cpu", progress=stumble, timeout=SECONDS)
        assert Remember(model) == before
    tensorfork.fork_into(model, seed.address, device="cpu", timeout=SECONDS)
    assert differing(model) == set()
    settled(seed)


def settled(seed: tensorfork.Seed) -> None:
    """All leases have been given back."""
    end = time.monotonic() + SECONDS
    while seed.stats().running and time.monotonic() < end:
        time.sleep(0.01)
    assert seed.stats().running == 0


# What cannot begin.


def test_a_transport_that_cannot_be_opened_is_unavailable_with_its_reason(seed: tensorfork.Seed) -> None:
    model = target("filled")
    before = differing(model)
    with pytest.raises(tensorfork.TransportUnavailable, match="the cable is out"):
        tensorfork.fork_into(
            model, seed.address, transport=faulty(faults.Unavailable("the cable is out")), timeout=SECONDS
        )
    assert differing(model) == before
    settled(seed)


@pytest.mark.parametrize(
    "error", [KeyError("gpus"), TypeError("an int is not a list"), AttributeError("get"), ValueError("what")]
)
def test_facts_that_make_no_sense_are_a_reason_against_a_transport(seed: tensorfork.Seed, error: Exception) -> None:
    class Puzzled(ZeroMQ):
        def why_not(self, fork: Any, seed: Any) -> str | None:
            raise error

    with pytest.raises(tensorfork.TransportUnavailable, match="makes no sense"):
        tensorfork.fork_into(target("filled"), seed.address, transport=Puzzled(), timeout=SECONDS)


def test_the_leases_of_forks_that_failed_are_given_back(seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(seed)
    monkeypatch.setattr(seed._service._leases, "peer_gone", lambda peer: [])  # only the forks give them back
    draw = random.Random(5)
    for _ in range(10):
        fault: Fault = draw.choice([*IN_FRESH_MEMORY, faults.Drop(reported=False), faults.Unavailable()])
        with pytest.raises(tensorfork.TensorForkError):
            tensorfork.fork_into(target("filled"), seed.address, transport=faulty(fault), timeout=3600.0)
    settled(seed)


@pytest.mark.parametrize("at", [0, 1], ids=["before the first byte", "after it"])
@pytest.mark.parametrize(
    "error",
    [
        tensorfork.TransportUnavailable("mine"),
        tensorfork.SeedChanged("mine"),
        tensorfork.SeedAsleep("mine"),
        tensorfork.ResourceExhausted("mine", resource="memory"),
        tensorfork.TransferFailed("mine"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_ours_that_progress_raises_are_the_caller_s_and_change_nothing_else(
    seed: tensorfork.Seed, error: Exception, at: int
) -> None:
    """No other transport is tried, nothing begins again, and nothing is added."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > at:
            raise error

    with pytest.raises(type(error)) as raised:
        tensorfork.fork(seed.address, progress=progress, restarts=3, wait=1.0, timeout=SECONDS)
    assert raised.value is error
    assert len(calls) == at + 1


def test_progress_counts_every_byte_once_and_in_order(seed: tensorfork.Seed) -> None:
    seen: list[tuple[int, int]] = []

    def note(moved: int, total: int) -> None:
        seen.append((moved, total))

    report = tensorfork.fork_into(
        target("filled"), seed.address, transport=faulty(Fault()), progress=note, timeout=SECONDS
    )
    assert seen[0] == (0, report.nbytes)
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert seen == sorted(set(seen))
    sizes: Callable[[torch.Tensor], int] = lambda tensor: tensor.numel() * tensor.element_size()  # noqa: E731
    unique = {tensor.data_ptr(): sizes(tensor) for tensor in tensors(Net()).values()}
    assert report.nbytes == sum(unique.values())
