"""Accidents that may happen to the bytes of a model, and a model for them. Each changes some bytes, somewhere."""

import itertools
import random
from collections.abc import Callable, Iterator

import torch

from tensorfork.digest import definition

WIDTHS = sorted({definition.WIDTH, definition.OTHER_WIDTH, 1021, 1024, 1031, 8192})
"""Of rectangles, in words: the digest's own, the rows of likely matrices, and neighbours of both."""


WORDS = 400 * 1031


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
