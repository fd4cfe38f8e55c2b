"""A transport's success is no evidence: whatever happens to the bytes on the way, over any transport, the digests find
it and the error names just the tensors that are wrong, as an independent hash sees them.

Places are drawn at random, the same in every run.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from accidents import ACCIDENTS, Model, everything_zeroed, flipped_bit, moved, original, other_bytes
from attrs import frozen
from processes import Child
from real_models import hash_of

import tensorfork
from tensorfork.testing import FaultyTransport, faults
from tensorfork.testing.faults import Job
from tensorfork.transports import registry

pytestmark = pytest.mark.slow

SECONDS = 30.0
TRIALS = 4


@frozen
class Way:
    """From where to where the bytes go, and over what. A fork that takes a second gets fewer trials."""

    transport: str
    there: str = "cpu"
    here: str = "cpu"
    trials: int = TRIALS

    def __str__(self) -> str:
        return self.transport if self.here == "cpu" else f"{self.transport} from {self.there} to {self.here}"


WAYS = [Way("zeromq"), Way("gloo"), Way("transfer_engine:tcp")]
ON_GPUS = [
    Way("cuda_ipc", "cuda:0", "cuda:0"),
    Way("cuda_ipc", "cuda:0", "cuda:1"),
    Way("transfer_engine:nvlink", "cuda:0", "cuda:1"),
    Way("nccl", "cuda:0", "cuda:1", trials=1),
    Way("zeromq", "cuda:0", "cuda:1"),
]


class Happens(faults.Spoiled):
    """The accident happens to what has arrived, before anybody is told that it has."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change

    def spoil(self, job: Job) -> None:
        self._change()


def a_seed(pipe: Any, make: Callable[[], Model], way: Way) -> None:
    """Publishes until told to end."""
    with tensorfork.publish(moved(make(), way.there), transports=[way.transport]) as seed:
        pipe.send(seed.address)
        try:
            pipe.recv()
        except EOFError:
            return


@pytest.fixture(
    scope="module",
    params=[*WAYS, *(pytest.param(way, marks=pytest.mark.gpu(1 if way.there == way.here else 2)) for way in ON_GPUS)],
    ids=str,
)
def way(request: pytest.FixtureRequest) -> Way:
    way: Way = request.param
    try:
        made = registry.load(way.transport)
        if way.here == "cpu":
            made.facts([])
    except tensorfork.TransportUnavailable as error:
        pytest.skip(str(error))
    return way


@pytest.fixture(scope="module")
def inner(way: Way) -> tensorfork.Transport:
    return registry.load(way.transport)


@pytest.fixture(scope="module")
def want() -> Model:
    return original()


@pytest.fixture(scope="module")
def seed(way: Way) -> Iterator[str]:
    """The address of a seed in another process."""
    with Child(a_seed, original, way) as child:
        yield child.recv()


def wrong(have: Mapping[str, torch.Tensor], want: Model) -> set[str]:
    return {name for name, tensor in have.items() if hash_of(tensor.cpu()) != hash_of(want[name])}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_every_accident_is_found_and_just_the_tensors_it_hit_are_named(
    way: Way, inner: tensorfork.Transport, seed: str, want: Model, accident: str
) -> None:
    ours = other_bytes(want, 1, way.here)
    for trial in range(way.trials):
        draw = random.Random(f"{way} {accident} {trial}")
        transport = FaultyTransport(inner, Happens(lambda draw=draw: ACCIDENTS[accident](ours, draw)))
        with pytest.raises(tensorfork.VerificationFailed) as caught:
            tensorfork.fork_into(ours, seed, transport=transport, timeout=SECONDS)
        hit = wrong(ours, want)
        assert hit
        assert set(caught.value.tensors) == hit == set(caught.value.ranges)
        assert all(name in str(caught.value) for name in hit)


PIECE = 1 << 16
COPY_FAULTS: dict[str, Callable[[random.Random, int, int], faults.Fault]] = {
    "one is not made": lambda draw, one, other: faults.Drop(one),
    "a page of one is what was there before": lambda draw, one, other: faults.StalePage(one, draw.randrange(16)),
    "a page of one is zeros": lambda draw, one, other: faults.ZeroPage(one, draw.randrange(16)),
    "one lies elsewhere": lambda draw, one, other: faults.Shift(one, draw.randrange(1, PIECE)),
    "two are exchanged": lambda draw, one, other: faults.SwapCopies(one, other),
}


class AtRandom(faults.Fault):
    """A fault of two copies of full length, whichever those are over this transport."""

    def __init__(self, what: str, draw: random.Random) -> None:
        self._what, self._draw = what, draw

    def pull(self, job: Job) -> None:
        whole = [job.number + i for i, copy in enumerate(job.copies) if copy.nbytes == PIECE]
        COPY_FAULTS[self._what](self._draw, *self._draw.sample(whole, 2)).pull(job)


@pytest.mark.parametrize("what", COPY_FAULTS)
def test_a_copy_that_goes_wrong_anywhere_is_found(
    way: Way, inner: tensorfork.Transport, seed: str, want: Model, what: str
) -> None:
    for trial in range(way.trials):
        ours = other_bytes(want, 2, way.here)
        transport = FaultyTransport(inner, AtRandom(what, random.Random(f"{way} {what} {trial}")))
        transport.piece = PIECE
        with pytest.raises(tensorfork.VerificationFailed) as caught:
            tensorfork.fork_into(ours, seed, transport=transport, timeout=SECONDS)
        assert set(caught.value.tensors) == wrong(ours, want) != set()


SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]] = {
    "contiguous": (torch.float32, (300, 70), (70, 1)),
    "transposed": (torch.bfloat16, (64, 96), (1, 64)),
    "with gaps": (torch.float16, (50, 30), (77, 2)),
    "in thousands of stretches": (torch.uint8, (3000, 5), (11, 1)),
    "overlapping": (torch.int32, (40, 8), (5, 1)),
    "expanded": (torch.float64, (6, 40), (0, 1)),
    "bool": (torch.bool, (999,), (1,)),
    "complex": (torch.complex64, (33, 3), (3, 1)),
    "fp8": (torch.float8_e4m3fn, (65, 33), (33, 1)),
    "scale": (torch.float8_e8m0fnu, (17,), (1,)),
    "number": (torch.int64, (), ()),
    "nothing": (torch.float32, (0, 4), (4, 1)),
}


def memory(number: int) -> Model:
    draw = torch.Generator().manual_seed(number)
    return {name: torch.randint(0, 256, (70_000 * 2,), dtype=torch.uint8, generator=draw) for name in SHAPES}


def views(memory: Model) -> Model:
    """A tensor of every kind, each in memory of its own."""
    made = {
        name: torch.empty(0, dtype=dtype, device=memory[name].device).set_(
            memory[name].untyped_storage(), 16, shape, stride
        )
        for name, (dtype, shape, stride) in SHAPES.items()
    }
    made["bool"].view(torch.uint8).bitwise_and_(1)
    return made | {"tied": made["contiguous"]}


def of_every_kind() -> Model:
    return views(memory(3))


def test_what_was_random_bytes_is_the_seed_s_in_every_byte_and_nothing_beside_it_changed(
    way: Way, inner: tensorfork.Transport
) -> None:
    """Corrupt, then restore: tensors of every kind, in memory that is otherwise known."""
    ours, kept, theirs = moved(memory(4), way.here), memory(4), of_every_kind()
    filled = views(ours)
    with Child(a_seed, of_every_kind, way) as seed:
        report = tensorfork.fork_into(filled, seed.recv(), transport=inner, timeout=SECONDS)
    assert report.verified
    assert report.not_compared == ("identity", "rank")
    assert not wrong(filled, theirs)
    for name, tensor in views(kept).items():  # what was there before, but for the elements, is there still
        new = filled[name].cpu()
        tensor.copy_(new) if name != "expanded" else tensor[0].copy_(new[0])
    assert all(torch.equal(ours[name].cpu(), kept[name]) for name in SHAPES)


def test_after_an_accident_the_next_fork_puts_everything_right(
    way: Way, inner: tensorfork.Transport, seed: str, want: Model
) -> None:
    ours = other_bytes(want, 4, way.here)
    transport = FaultyTransport(inner, Happens(lambda: everything_zeroed(ours, random.Random(0))))
    with pytest.raises(tensorfork.VerificationFailed):
        tensorfork.fork_into(ours, seed, transport=transport, timeout=SECONDS)
    tensorfork.fork_into(ours, seed, transport=inner, timeout=SECONDS)
    assert not wrong(ours, want)


def test_without_verification_the_accident_goes_unseen_and_the_report_says_what_was_not_compared(
    way: Way, inner: tensorfork.Transport, seed: str, want: Model
) -> None:
    """That is: it is the digests that find it, and nothing else would."""
    ours = other_bytes(want, 5, way.here)
    transport = FaultyTransport(inner, Happens(lambda: flipped_bit(ours, random.Random(0))))
    report = tensorfork.fork_into(ours, seed, transport=transport, timeout=SECONDS, verify=False)
    assert not report.verified
    assert "digests" in report.not_compared
    assert len(wrong(ours, want)) == 1
