"""Layouts, pairs and copies byte by byte, for tests of matching and cutting; and random cases of them."""

import itertools
from collections.abc import Mapping, Sequence

from attrs import evolve, frozen
from hypothesis import strategies as st

from tensorfork import Copy, ModelLayout, Place, StorageLayout, TensorLayout
from tensorfork.fork.pairs import Pair
from tensorfork.layout import plain_stride

Byte = tuple[int, int]
"""A storage (or a region), and an offset in it."""


def tensor(
    name: str,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
    *,
    at: Byte = (0, 0),
    dtype: str = "uint8",
) -> TensorLayout:
    given = (
        plain_stride(shape, stride) if stride is not None else plain_stride([*shape, 0], [0] * (len(shape) + 1))[:-1]
    )
    return TensorLayout(name, dtype, tuple(shape), given, *at)


def layout(*tensors: TensorLayout) -> ModelLayout:
    """Of storages just as long as the tensors need."""
    count = max((one.storage for one in tensors), default=-1) + 1
    sizes = [max([one.offset + one.extent for one in tensors if one.storage == i], default=0) for i in range(count)]
    return ModelLayout(tensors, tuple(StorageLayout(size, "cpu") for size in sizes))


def bytes_of(one: TensorLayout) -> list[Byte]:
    """Every byte of every element, in the elements' order."""
    size = one.torch_dtype.itemsize
    return [
        (one.storage, one.offset + sum(i * step for i, step in zip(index, one.stride, strict=True)) * size + k)
        for index in itertools.product(*map(range, one.shape))
        for k in range(size)
    ]


def wanted(pairs: Sequence[Pair]) -> dict[Byte, Byte]:
    """By byte of ours, the byte of theirs that it is to get. They agree where tensors share memory."""
    want: dict[Byte, Byte] = {}
    for pair in pairs:
        for source, into in zip(bytes_of(pair.theirs), bytes_of(pair.ours), strict=True):
            assert want.setdefault(into, source) == source
    return want


def conflicting(pairs: Sequence[Pair]) -> bool:
    """Whether a byte of ours is to be two bytes of theirs."""
    want: dict[Byte, set[Byte]] = {}
    for pair in pairs:
        for source, into in zip(bytes_of(pair.theirs), bytes_of(pair.ours), strict=True):
            want.setdefault(into, set()).add(source)
    return any(len(sources) > 1 for sources in want.values())


def at(byte: Byte, places: Mapping[int, Place]) -> Byte:
    place = places[byte[0]]
    return place.region, place.offset + byte[1]


def fetched(copies: Sequence[Copy]) -> dict[Byte, Byte]:
    """By byte of our regions, the byte of theirs that the copies bring. No byte is brought twice."""
    got: dict[Byte, Byte] = {}
    for copy in copies:
        assert copy.nbytes > 0
        for i in range(copy.nbytes):
            assert (copy.into, copy.at + i) not in got, "a byte is written twice"
            got[copy.into, copy.at + i] = copy.region, copy.offset + i
    return got


@frozen
class Case:
    """A seed's layout and ours, of the same tensors at other places."""

    theirs: ModelLayout
    ours: ModelLayout


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int], str]:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]))
    kind = draw(st.sampled_from(["dense", "permuted", "gaps", "any"]))
    stride, step = [0] * len(shape), 1
    order = draw(st.permutations(range(len(shape)))) if kind == "permuted" else reversed(range(len(shape)))
    for i in order:
        if kind == "gaps":
            step += draw(st.integers(0, 3))
        stride[i], step = step, step * max(shape[i], 1)
    if kind == "any":
        stride = [draw(st.integers(0, 9)) for _ in shape]
    return shape, stride, dtype


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tensors in a few storages: anywhere in theirs (ties, views, overlaps), and anywhere in ours."""
    theirs: list[TensorLayout] = []
    ours: list[TensorLayout] = []
    keep = draw(st.booleans())  # whether ours lie to one another as theirs do
    shift = [draw(st.integers(0, 5)) * 16 for _ in range(3)]
    for i in range(draw(st.integers(1, 6))):
        if theirs and draw(st.integers(0, 3)) == 0:
            again = draw(st.sampled_from(theirs))
            theirs.append(evolve(again, name=f"t{i}"))
        else:
            shape, stride, dtype = draw(shapes())
            place = draw(st.integers(0, 2)), draw(st.integers(0, 12)) * 16
            theirs.append(tensor(f"t{i}", shape, stride, at=place, dtype=dtype))
        here = (theirs[i].storage, theirs[i].offset + shift[theirs[i].storage])
        if not keep and draw(st.booleans()):
            here = draw(st.integers(0, 4)), draw(st.integers(0, 40)) * 16
        ours.append(evolve(theirs[i], storage=here[0], offset=here[1]))
    return Case(layout(*theirs), layout(*draw(st.permutations(ours))))


@st.composite
def places(draw: st.DrawFn, storages: Sequence[StorageLayout]) -> tuple[dict[int, Place], dict[int, int]]:
    """Each storage in a region: its own, or one beside others, with room between; and the regions' sizes."""
    found: dict[int, Place] = {}
    sizes: dict[int, int] = {}
    for i in draw(st.permutations(range(len(storages)))):
        region = draw(st.integers(100, 100 + len(storages)))
        offset = sizes.get(region, 0) + draw(st.sampled_from([0, 0, 1, 64]))
        found[i] = Place(region, offset)
        sizes[region] = offset + storages[i].nbytes
    return found, sizes
