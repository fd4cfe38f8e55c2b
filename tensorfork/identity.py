"""What must be equal for two instances to hold the same bytes, and which part of the model each of them holds.

tensorfork cannot see these things in the tensors: a draft model, another revision or another rank's shard may have the
same names, dtypes and shapes. The caller says them, or the adapter of its engine.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, fields, frozen

from tensorfork.validators import index_field, optional_text_field, texts_field

Differences = Mapping[str, tuple[object, object]]
"""By field: the seed's value and ours."""


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

    model: str | None = field(default=None, validator=optional_text_field)
    revision: str | None = field(default=None, validator=optional_text_field)
    dtype: str | None = field(default=None, validator=optional_text_field)
    quantization: str | None = field(default=None, validator=optional_text_field)
    role: str | None = field(default=None, validator=optional_text_field)
    engine: str | None = field(default=None, validator=optional_text_field)
    engine_version: str | None = field(default=None, validator=optional_text_field)
    kernels: Mapping[str, str] = field(factory=dict, converter=_frozen, validator=texts_field, hash=False)
    tags: Mapping[str, str] = field(factory=dict, converter=_frozen, validator=texts_field, hash=False)

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

    tp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    pp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    ep: tuple[int, int] = field(default=(0, 1), validator=index_field)
    cp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    dp: tuple[int, int] = field(default=(0, 1), validator=index_field)

    def differences(self, ours: "Rank") -> Differences:
        """Every coordinate in which the seed's rank, this one, is not ours, but for dp."""
        pairs = {name: (getattr(self, name), getattr(ours, name)) for name in ("tp", "pp", "ep", "cp")}
        return {f"rank.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, tuple[int, int]]:
        """Its coordinates by name."""
        return {one.name: getattr(self, one.name) for one in fields(Rank)}

    def __repr__(self) -> str:
        return f"Rank({', '.join(f'{name}={value}' for name, value in self.as_dict().items() if value != (0, 1))})"
