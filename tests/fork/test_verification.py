"""A transport's success is no evidence: whatever happens to the bytes on the way, over any transport, the digests find
it and the error names just the tensors that are wrong, as an independent hash sees them.

Places are drawn at random, the same in every run.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from attrs import frozen
from processes import Child
from real_models import hash_of

import tensorfork
from tensorfork.digest import definition
from tensorfork.testing import FaultyTransport, faults
from tensorfork.testing.faults import Job
from tensorfork.transports import registry

SECONDS = 30.0
TRIALS = 4
WIDTHS = sorted({definition.WIDTH, definition.OTHER_WIDTH, 1021, 1024, 1031, 8192})
"""Of rectangles, in words: the digest's own, the rows of likely matrices, and neighbours of both."""
WORDS = 400 * 1031


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

Model = dict[str, torch.Tensor]
Accident = Callable[[Model, random.Random], object]


Corners = tuple[int, int, int, int]


def rectangles() -> Iterator[tuple[str, Corners]]:
    """Four places each, in words, and of which kind: the corners of rectangles in a matrix of one of the widths, and of
    those whose sides are multiples of one and the other of the digest's, which columns of neither can see.
    """
    draw = random.Random("rectangles")
    for _ in range(8):
        for width in WIDTHS:
            row, column = draw.randrange(WORDS // width // 2), draw.randrange(width // 2)
            down, right = draw.choice([1, 16, draw.randrange(1, WORDS // width // 2)]), draw.randrange(1, width // 2)
            yield f"of a matrix {width} words wide", corners(row * width + column, down * width, right)
        start, down, right = draw.randrange(WORDS // 4), draw.randrange(1, 150), draw.randrange(1, 150)
        yield "of both widths of the digest", corners(start, definition.WIDTH * down, definition.OTHER_WIDTH * right)


def corners(start: int, down: int, right: int) -> Corners:
    return start, start + right, start + down, start + down + right


def apart() -> dict[str, list[Corners]]:
    """Those that have no place in common with one before them, by their kinds."""
    taken: set[int] = set()
    found: dict[str, list[Corners]] = {}
    for kind, places in rectangles():
        if not taken & set(places):
            taken |= set(places)
            found.setdefault(kind, []).append(places)
    return found


RECTANGLES = apart()


def original() -> Model:
    """A long tensor with equal values at the opposite corners of rectangles, experts of one size, neighbours in one
    storage, odd sizes, a number.
    """
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 62), 1 << 62, shape, generator=draw)

    long = noise(WORDS)
    for one, other, another, last in itertools.chain(*RECTANGLES.values()):
        long[last], long[another] = long[one].clone(), long[other].clone()
    packed = noise(3000).view(torch.uint8)
    return {
        "long": long,
        **{f"experts.{i}": noise(96, 64).view(torch.bfloat16) for i in range(6)},
        **{f"packed.{i}": packed[start : start + 4799] for i, start in enumerate(range(0, 24000 - 4799, 4799))},
        "bytes": noise(5000).view(torch.uint8)[:39_997],
        "step": torch.tensor(7),
    }


def other_bytes(like: Model, seed: int, device: str) -> Model:
    """Tensors of the same layout with random bytes in them."""
    made = target(like)
    draw = torch.Generator().manual_seed(seed)
    for tensor in made.values():
        flat(tensor).random_(0, 256, generator=draw)
    return moved(made, device)


def moved(model: Model, device: str) -> Model:
    """The same on another device, sharing storages as before."""
    there: dict[int, torch.UntypedStorage] = {}
    made: Model = {}
    for name, tensor in model.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            there[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device).untyped_storage()
        made[name] = torch.empty(0, dtype=tensor.dtype, device=device).set_(
            there[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return made


def target(like: Model) -> Model:
    copies: dict[int, torch.Tensor] = {}
    made: Model = {}
    for name, tensor in like.items():
        storage = tensor.untyped_storage()
        copy = copies.setdefault(storage.data_ptr(), torch.zeros(storage.nbytes(), dtype=torch.uint8))
        made[name] = torch.empty(0, dtype=tensor.dtype).set_(
            copy.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return made


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def words(tensor: torch.Tensor) -> torch.Tensor:
    return flat(tensor)[: tensor.nbytes // 8 * 8].view(torch.int64)


# What may happen to bytes. Each changes some, somewhere.


def flipped_bit(model: Model, draw: random.Random) -> None:
    tensor = flat(model[draw.choice(list(model))])
    tensor[draw.randrange(tensor.numel())] ^= 1 << draw.randrange(8)


def two_words_exchanged(model: Model, draw: random.Random) -> None:
    tensor = words(model[draw.choice(["long", "experts.3", "bytes"])])
    i, j = draw.sample(range(tensor.numel()), 2)
    tensor[[i, j]] = tensor[[j, i]]


def four_corners_exchanged(kind: str) -> Accident:
    def exchange(model: Model, draw: random.Random) -> None:
        one, other, another, last = draw.choice(RECTANGLES[kind])
        long = model["long"]
        long[[one, other, another, last]] = long[[other, one, last, another]]

    return exchange


def four_corners_changed_by_as_much(kind: str) -> Accident:
    def change(model: Model, draw: random.Random) -> None:
        one, other, another, last = draw.choice(RECTANGLES[kind])
        by = 1 << draw.randrange(64)
        by -= (by >> 63) << 64
        long = model["long"]
        long[[one, last]] += by
        long[[other, another]] -= by

    return change


def tensors_swapped(model: Model, draw: random.Random) -> None:
    kind = draw.choice(["experts", "packed"])
    i, j = draw.sample([name for name in model if name.startswith(kind)], 2)
    kept = model[i].clone()
    model[i].copy_(model[j])
    model[j].copy_(kept)


def rows_swapped(model: Model, draw: random.Random) -> None:
    rows = words(model["long"])[: WORDS // 1024 * 1024].view(-1, 1024)
    i, j = draw.sample(range(len(rows)), 2)
    rows[[i, j]] = rows[[j, i]]


def page_zeroed(model: Model, draw: random.Random) -> None:
    tensor = flat(model[draw.choice(["long", "bytes"])])
    start = draw.randrange(tensor.numel() // 4096) * 4096
    tensor[start : start + 4096] = 0


def everything_zeroed(model: Model, draw: random.Random) -> None:
    """The failure that the field knows best: destinations of zeros, and a success."""
    for tensor in model.values():
        tensor.zero_()


def shifted_copy(model: Model, draw: random.Random) -> None:
    tensor = flat(model[draw.choice(["long", "experts.0", "bytes"])])
    start = draw.randrange(tensor.numel() // 2)
    stretch = tensor[start : start + draw.randrange(2, tensor.numel() // 2)]
    stretch.copy_(stretch.roll(draw.choice([1, 2, 7, 8, -8, 64, 4096, -4096])))


def bytes_beyond_the_end(model: Model, draw: random.Random) -> None:
    """The end of one tensor's copy overruns what lies behind it in the same storage."""
    i = draw.randrange(4)
    model[f"packed.{i + 1}"][: draw.randrange(1, 100)] ^= 255


def last_bytes_missing(model: Model, draw: random.Random) -> None:
    tensor = flat(model[draw.choice(list(model))])
    tensor[-draw.randrange(1, 8) :] ^= 255


ACCIDENTS: dict[str, Accident] = {
    "a flipped bit": flipped_bit,
    "two words exchanged": two_words_exchanged,
    **{f"four corners {kind} exchanged": four_corners_exchanged(kind) for kind in RECTANGLES},
    **{f"four corners {kind} changed by as much": four_corners_changed_by_as_much(kind) for kind in RECTANGLES},
    "two tensors swapped": tensors_swapped,
    "two rows swapped": rows_swapped,
    "a page zeroed": page_zeroed,
    "everything zeroed": everything_zeroed,
    "a shifted copy": shifted_copy,
    "bytes beyond the end": bytes_beyond_the_end,
    "the last bytes missing": last_bytes_missing,
}


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
        assert set(caught.value.tensors) == hit
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
