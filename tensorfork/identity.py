"""What must be equal for two instances to hold the same bytes, and which part of the model each of them holds.

tensorfork cannot see these things in the tensors: a draft model, another revision or another rank's shard may have the
same names, dtypes and shapes. The caller says them, or the adapter of its engine.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import Attribute, field, fields, frozen

MAX_TEXT = 4096
MAX_ENTRIES = 256
Differences = Mapping[str, tuple[object, object]]
"""By field: the seed's value and ours."""


def _text(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if value is not None and (type(value) is not str or len(value) > MAX_TEXT):
        raise TypeError(f"{attribute.name} must be a text of at most {MAX_TEXT} characters, not {str(value)[:80]!r}")


def _texts(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{attribute.name} must map texts to texts, not be {str(value)[:80]!r}")
    if len(value) > MAX_ENTRIES:
        raise ValueError(f"{attribute.name} has {len(value)} entries; {MAX_ENTRIES} at most")
    for key, one in value.items():
        if type(key) is not str or type(one) is not str or max(len(key), len(one)) > MAX_TEXT:
            raise TypeError(f"{attribute.name} must map texts to texts, not {str(key)[:40]!r} to {str(one)[:40]!r}")


def _index(instance: object, attribute: "Attribute[Any]", value: object) -> None:
    if type(value) is not tuple or len(value) != 2 or not all(type(one) is int for one in value):
        raise TypeError(f"{attribute.name} must be (index, size), not {str(value)[:80]}")
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"{attribute.name} must be (index, size) with an index below the size, not {value}")


def _frozen(value: Any) -> Any:
    return MappingProxyType(dict(value)) if isinstance(value, Mapping) else value


@frozen(kw_only=True, repr=False)
class Identity:
    """Which model an instance serves, and how. Two are the same only if every field is, the empty ones too.

    Attributes:
        model: its name, such as ``meta-llama/Llama-3.1-8B``.
        revision: the commit or version of its weights.
        dtype: what they were loaded as.
        quantization: the method, and what else decides about it.
        role: ``target`` or ``draft``, where one engine serves both.
        engine: which engine laid the weights out.
        engine_version: its version.
        kernels: the choices that decide how weights are laid out, such as ``{"attention": "flashinfer"}``.
        tags: whatever else must be equal.
    """

    model: str | None = field(default=None, validator=_text)
    revision: str | None = field(default=None, validator=_text)
    dtype: str | None = field(default=None, validator=_text)
    quantization: str | None = field(default=None, validator=_text)
    role: str | None = field(default=None, validator=_text)
    engine: str | None = field(default=None, validator=_text)
    engine_version: str | None = field(default=None, validator=_text)
    kernels: Mapping[str, str] = field(factory=dict, converter=_frozen, validator=_texts, hash=False)
    tags: Mapping[str, str] = field(factory=dict, converter=_frozen, validator=_texts, hash=False)

    def differences(self, ours: "Identity") -> Differences:
        """Every field in which the seed's identity, this one, is not ours; of mappings, every entry."""
        seen, wanted = self._flat(), ours._flat()
        names = dict.fromkeys([*wanted, *seen])
        return {name: (seen.get(name), wanted.get(name)) for name in names if seen.get(name) != wanted.get(name)}

    def as_dict(self) -> dict[str, Any]:
        """Its fields, in plain types."""
        values = {one.name: getattr(self, one.name) for one in fields(Identity)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def _flat(self) -> dict[str, object]:
        flat: dict[str, object] = {}
        for name, value in self.as_dict().items():
            flat |= (
                {f"{name}[{key!r}]": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
            )
        return flat

    def __repr__(self) -> str:
        return f"Identity({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items() if value)})"


@frozen(kw_only=True, repr=False)
class Rank:
    """Which part of the model a process holds: its (index, size) along each kind of parallelism.

    Two hold the same part if all are equal but `dp`: replicas along data parallelism hold the same bytes, and any of
    them may be the seed of any other.

    Attributes:
        tp: tensor parallelism.
        pp: pipeline parallelism.
        ep: expert parallelism.
        cp: context parallelism.
        dp: data parallelism; said for the reader's sake, and never compared.
    """

    tp: tuple[int, int] = field(default=(0, 1), validator=_index)
    pp: tuple[int, int] = field(default=(0, 1), validator=_index)
    ep: tuple[int, int] = field(default=(0, 1), validator=_index)
    cp: tuple[int, int] = field(default=(0, 1), validator=_index)
    dp: tuple[int, int] = field(default=(0, 1), validator=_index)

    def differences(self, ours: "Rank") -> Differences:
        """Every coordinate in which the seed's rank, this one, is not ours, but for dp."""
        pairs = {name: (getattr(self, name), getattr(ours, name)) for name in ("tp", "pp", "ep", "cp")}
        return {f"rank.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, tuple[int, int]]:
        """Its coordinates by name."""
        return {one.name: getattr(self, one.name) for one in fields(Rank)}

    def __repr__(self) -> str:
        return f"Rank({', '.join(f'{name}={value}' for name, value in self.as_dict().items() if value != (0, 1))})"
