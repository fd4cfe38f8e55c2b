"""The plain values beside the tensors: where they are read, what they are called, and how they are encoded."""

import enum
import functools
import logging
import re
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from structures import Plain, Slotted, module, one
from test_walk_only_reads import Trap
from torch import nn

from tensorfork.model import values as reading
from tensorfork.model.kinds import Classifier
from tensorfork.model.selection import Selection
from tensorfork.model.value_encoding import Encoder, same
from tensorfork.model.value_kinds import Array, Named
from tensorfork.model.value_writes import prepare_write
from tensorfork.model.values import Collection, Values, read_values
from tensorfork.model.walk import walk

SALT = bytes(16)


def read(model: nn.Module, **selection: Any) -> Values:
    visited = walk(model, Selection(**selection)).visited
    assert visited is not None
    return read_values(visited)


def values_of(model: nn.Module, **selection: Any) -> dict[str, Any]:
    found = read(model, **selection)
    assert len(found.names) == len(found.values) == len(found.places) == len(set(found.names))
    return dict(zip(found.names, found.values, strict=True))


def encoded(value: Any, salt: bytes = SALT) -> Any:
    """How a model's attribute of this value is encoded."""
    return Encoder(salt).encode(values_of(module(it=value))["it"])


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Pair(NamedTuple):
    low: float
    high: float


class Text(str):
    __slots__ = ()


class Half(float):
    def __float__(self) -> float:
        raise AssertionError("its code was run")


@dataclass(frozen=True)
class Settings:
    eps: float = 0.1


def test_numbers_and_texts_are_found_wherever_the_walk_goes() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.weight.loaded_from = 3  # type: ignore[attr-defined]
            self.k_scale_float, self.name, self.on, self.nothing = 0.5, "text", True, None
            self.items, self.pair, self.ring = [1, 2.0], Pair(0.0, 1.0), deque([7])
            self.by = {"a": 1, 2: "b", Level.LOW: 3}
            self.settings, self.slotted = Settings(), Slotted(0.25)
            self.view, self.ordered = MappingProxyType({"x": 1}), OrderedDict(y=2)
            self.dtype, self.size = torch.float16, torch.Size([2])
            self.inner = nn.Linear(2, 3)

    found = values_of(Holder())
    assert found == {
        "weight.loaded_from": 3,
        "training": True,
        "k_scale_float": 0.5,
        "name": "text",
        "on": True,
        "nothing": None,
        "dtype": torch.float16,
        "size": torch.Size([2]),
        "inner": Named("Linear"),
        "inner.training": True,
        "inner.in_features": 2,
        "inner.out_features": 3,
        "items[0]": 1,
        "items[1]": 2.0,
        "pair": Named("Pair"),
        "pair.low": 0.0,
        "pair.high": 1.0,
        "ring[0]": 7,
        "by['a']": 1,
        "by[2]": "b",
        "by[Level.LOW]": 3,
        "settings": Named("Settings"),
        "settings.eps": 0.1,
        "slotted": Named("Slotted"),
        "slotted.scale": 0.25,
        "slotted.inner": None,
        "view['x']": 1,
        "ordered": Named("OrderedDict"),
        "ordered['y']": 2,
    }


def test_what_torch_keeps_on_modules_and_tensors_is_no_value() -> None:
    model = nn.Module()
    model.register_buffer("b", torch.zeros(1), persistent=False)
    model.c = nn.Buffer(torch.zeros(1), persistent=False)
    model.register_forward_hook(lambda *_: None)
    assert values_of(model) == {"training": True}


def test_functions_and_classes_are_compared_by_name_and_lambdas_by_what_they_refer_to() -> None:
    found = values_of(
        module(act=nn.functional.relu, made_of=nn.GELU, builtin=torch.relu, level=Level.HIGH, bits=Bits(3))
    )
    assert found["act"] == Named("relu")
    assert found["made_of"] == Named("GELU")
    assert found["level"] == Named("Level.HIGH")
    assert found["bits"].text.startswith("Bits.")
    gelu, relu = (lambda x: nn.functional.gelu(x)), (lambda x: nn.functional.relu(x))
    doubled, tripled = (lambda x: x * 2), (lambda x: x * 3)
    assert len({encoded(function) for function in (gelu, relu, doubled, tripled)}) == 4
    assert encoded(lambda x: nn.functional.gelu(x)) != encoded(nn.functional.gelu)


def test_what_partials_methods_and_closures_hold_is_read() -> None:
    scale, inner = 0.5, Plain(deep=[1.5])

    def scaled(x: Any, *, factor: float = 2.0) -> Any:
        return x * scale * factor * len(inner.deep)

    model = module(scaled=scaled, part=functools.partial(round, 3, ndigits=2), bound=Plain(own=1).__init__)
    found = values_of(model)
    assert found["scaled.__closure__.scale"] == 0.5
    assert found["scaled.__kwdefaults__['factor']"] == 2.0
    assert found["scaled.__closure__.inner.deep[0]"] == 1.5
    assert (found["part.func"], found["part.args[0]"], found["part.keywords['ndigits']"]) == (Named("round"), 3, 2)
    assert found["bound.__self__.own"] == 1


def test_functions_that_refer_to_themselves_and_to_the_model_end() -> None:
    def recurse() -> Any:
        return recurse, model

    model = module(again=recurse, twice=[recurse])
    assert [name for name in values_of(model) if "again" in name or "twice" in name] == [
        "again", "again.__closure__.recurse", "twice[0]",
    ]  # fmt: skip


def test_small_arrays_are_compared_by_content() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(6, dtype="<f4").reshape(2, 3)
    assert values_of(module(a=array))["a"].__class__ is Array
    assert encoded(array) == encoded(array.copy(order="F"))
    others = [array + 1, array.astype("<f8"), array.reshape(3, 2), array.astype(">f4")]
    assert encoded(array) not in map(encoded, others)
    assert encoded(numpy.float32(0.5)) != encoded(numpy.float32(0.25))
    assert encoded(numpy.float64(0.5)) == 0.5


def test_what_cannot_be_looked_into_is_named_and_what_matters_to_nobody_is_not() -> None:
    numpy = pytest.importorskip("numpy")
    loose, held, layer = one(), one(), nn.Linear(1, 1)
    model = module(
        large=numpy.zeros(reading.MAX_ARRAY + 1, dtype="u1"),
        objects=numpy.array([object()], dtype=object),
        generator=torch.Generator(),
        mixed={1, object()},
        held=held,
        partial=functools.partial(round, loose, held),
        closure=(lambda: (loose, held, layer)),
        log=logging.getLogger(),
        lock=threading.Lock(),
    )
    assert read(model).opaque == [
        "large",
        "objects",
        "generator",
        "mixed",
        "partial.args[0]",
        "closure.__closure__.layer",
    ], "a tensor that the walk has not found is named once"
    many = module(all=[re.compile(str(i)) for i in range(reading.MAX_OPAQUE + 1)])
    assert len(read(many).opaque) == reading.MAX_OPAQUE


def test_a_long_collection_is_one_value_and_what_else_is_in_it_is_read() -> None:
    inside = Plain(x=1)
    words = {f"word{i}": i for i in range(reading.LONG_MAPPING + 1)}
    found = values_of(module(words={**words, "other": inside}, numbers=[*range(reading.LONG_SEQUENCE + 1)]))
    names = ["training", "words[*]", "words['other']", "words['other'].x", "numbers[*]"]
    assert sorted(found) == sorted(names)
    pairs = [("a", "b")] * 50
    assert sorted(values_of(module(merges=pairs))) == ["merges[*]", "training"]


def test_a_collection_of_more_than_a_million_entries_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ENTRIES", 100)
    found = read(module(a=[1] * 100, b=[1] * 101, c={i: i for i in range(101)}, d=Plain(x=1)))
    assert set(found.names) == {"training", "a[*]", "d", "d.x"}
    assert found.opaque == ["b", "c"]


def test_the_order_of_a_dict_or_a_set_does_not_count_and_all_else_does() -> None:
    words = {f"word{i}": i for i in range(100)}

    def hashed(value: Any) -> Any:
        (collection,) = (one for one in values_of(module(it=value)).values() if isinstance(one, Collection))
        return Encoder(SALT).encode(collection)

    assert hashed(words) == hashed(dict(reversed(words.items())))
    assert hashed(words) != hashed({**words, "word7": 8})
    assert hashed(words) != hashed({**words, "word7": 7.0})
    assert hashed({3, "a", None}) == hashed({None, "a", 3})
    assert hashed({1, 2}) != hashed({1, 2, 3})
    numbers = list(range(5000))
    assert hashed(numbers) != hashed(numbers[::-1])
    assert hashed(numbers) == hashed(tuple(numbers))
    strange = [*range(20), 1 << 70, float("nan"), "\ud800", b"\xff", torch.int8, Level.LOW, None, (1, [2, {"a": 3}])]
    assert hashed(strange) == hashed(list(strange))


def test_numbers_travel_as_they_are_and_everything_else_as_a_hash_with_a_salt() -> None:
    for number in (True, 0, -(1 << 63), (1 << 63) - 1, 0.1, float("inf"), None):
        assert encoded(number) is number
    assert encoded(2 + 1j) == [2.0, 1.0]
    texts = ["", "text", Text("text"), b"text", bytearray(b"x"), 1 << 63, 1 << 64, torch.int8, torch.Size([1])]
    texts += [torch.device("cpu"), Level.LOW, nn.GELU, "\udfff"]
    assert all(type(encoded(value)) is bytes and len(encoded(value)) == 16 for value in texts)
    assert encoded("text") == encoded(Text("text")) != encoded(b"text")
    assert len(set(map(encoded, texts))) == len(texts) - 1
    assert encoded("text", bytes(15) + b"x") != encoded("text")
    assert encoded("Linear") != encoded(nn.Linear), "a text is no class"


def test_values_are_compared_bit_by_bit() -> None:
    assert same(float("nan"), float("nan"))
    assert same([0.0, float("nan")], [0.0, float("nan")])
    different = [0.0, -0.0, 0, False, None, 1, True, 1.0, bytes(16), [0.0, 0.0], [0.0, -0.0], float("nan")]
    assert [[i for i, other in enumerate(different) if same(value, other)] for value in different] == [
        [i] for i in range(len(different))
    ]


def test_names_that_cannot_travel_and_values_beyond_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(module(by={"\ud800": 1, "x" * reading.MAX_NAME: 2})).beyond == 1  # the first is escaped
    odd = module()
    odd.__dict__["\ud800"] = 1
    assert (read(odd).names, read(odd).beyond) == (["training"], 1)
    monkeypatch.setattr(reading, "MAX_VALUES", 3)
    found = read(module(a=1, b=2, c=3, d=[4, 5]))
    assert (found.names, found.beyond) == (["training", "a", "b"], 3)


def test_include_and_exclude_choose_among_values_too() -> None:
    model = module(a=Plain(x=1, y=2), b=3)
    assert set(values_of(model, exclude=["a.x", "training"])) == {"a", "a.y", "b"}
    model.also = one()
    assert set(values_of(model, include=["a*"])) == {"a", "a.x", "a.y"}


def test_no_code_of_the_model_is_run() -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            assert name not in ("__qualname__", "__name__"), "the class was asked for its name"
            return super().__getattribute__(name)

    class Strange(nn.Module, metaclass=Meta):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    class Sub(functools.partial):  # type: ignore[type-arg]
        func = args = keywords = property(lambda self: 1 / 0)

    class Text(str):
        def __str__(self) -> str:
            raise AssertionError("it was printed")

    model = module(traps=[Trap(), Half(0.5), Text("a")], sub=Sub(round, 1), strange=Strange())
    found = values_of(model)
    assert (found["traps[1]"], found["traps[2]"], found["sub.args[0]"]) == (0.5, "a", 1)
    assert found["strange"] == Named("test_no_code_of_the_model_is_run.<locals>.Strange")


class Pretends:
    """Its class is asked for by `isinstance`, where that is code of its own."""

    @property
    def __class__(self) -> Any:
        raise AssertionError("its class was asked for")


class PretendsToo(Pretends, tuple):  # type: ignore[type-arg]
    pass


class PretendsNumber(Pretends, float):
    pass


class Nameless(enum.Enum):
    ONE = 1

    @property
    def name(self) -> Any:
        raise AssertionError("its name was asked for")


def test_no_code_is_run_to_learn_what_class_or_name_something_has() -> None:
    held = Pretends()
    held.__dict__["x"] = 2
    model = module()
    model.__dict__.update(
        a=held, b=PretendsToo([3]), c=PretendsNumber(0.5), d={Nameless.ONE: 4}, e={PretendsToo([Nameless.ONE]): 5}
    )
    found = walk(model)
    assert found.visited is not None
    values = read_values(found.visited)
    read = dict(zip(values.names, values.values, strict=True))
    assert (read["a.x"], read["b[0]"], read["c"]) == (2, 3, 0.5)
    assert (read["d[Nameless.ONE]"], read["e[(Nameless.ONE)]"]) == (4, 5)
    classifier = Classifier()
    assert 2 in [held for _, one in found.visited.objects for held in reading.contents_of(one, classifier)]
    places = dict(zip(values.names, values.places, strict=True))
    assert isinstance(prepare_write(places["b[0]"], 1), str)


def test_a_mapping_of_tensors_has_none() -> None:
    assert walk({"a": one()}).visited is None
