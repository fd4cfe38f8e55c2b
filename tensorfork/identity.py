"""Which model an instance serves, and which part of it a process holds.

Tensors do not tell these things: a draft model, another revision or another rank's shard may have the same names,
dtypes and shapes. The caller gives them, or the adapter of its engine.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, fields, frozen

from tensorfork.validators import index_field, optional_text_field, texts_field

Differences = Mapping[str, tuple[object, object]]
"""By the name of each field that differs: the seed's value and ours."""


def _read_only(value: Any) -> Any:
    return MappingProxyType(dict(value)) if isinstance(value, Mapping) else value


@frozen(kw_only=True, repr=False)
class Identity:
    """Which model an instance serves, and how. Two are equal only if every field is, also where it is not given.

    Attributes:
        model: its name, such as ``meta-llama/Llama-3.1-8B``.
        revision: the commit or version of its weights.
        dtype: that its weights were loaded as.
        quantization: the method and its parameters.
        role: ``target`` or ``draft``, where one engine serves both.
        engine: the inference engine, which decides how weights are laid out.
        engine_version: its version.
        kernels: choices that change how weights are laid out, such as ``{"attention": "flashinfer"}``.
        tags: anything else that must be equal.
    """

    model: str | None = field(default=None, validator=optional_text_field)
    revision: str | None = field(default=None, validator=optional_text_field)
    dtype: str | None = field(default=None, validator=optional_text_field)
    quantization: str | None = field(default=None, validator=optional_text_field)
    role: str | None = field(default=None, validator=optional_text_field)
    engine: str | None = field(default=None, validator=optional_text_field)
    engine_version: str | None = field(default=None, validator=optional_text_field)
    kernels: Mapping[str, str] = field(factory=dict, converter=_read_only, validator=texts_field, hash=False)
    tags: Mapping[str, str] = field(factory=dict, converter=_read_only, validator=texts_field, hash=False)

    def differences(self, ours: "Identity") -> Differences:
        """Every field in which the seed's identity, this one, differs from ours; of mappings, every entry."""
        theirs, mine = self._flat(), ours._flat()
        names = dict.fromkeys([*mine, *theirs])
        return {name: (theirs.get(name), mine.get(name)) for name in names if theirs.get(name) != mine.get(name)}

    def as_dict(self) -> dict[str, Any]:
        """Its fields, as plain types."""
        values = {one.name: getattr(self, one.name) for one in fields(Identity)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.as_dict())  # a read-only view of a dict cannot be pickled

    def _flat(self) -> dict[str, object]:
        flat: dict[str, object] = {}
        for name, value in self.as_dict().items():
            flat |= (
                {f"{name}[{key!r}]": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
            )
        return flat

    def __repr__(self) -> str:
        return f"Identity({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items() if value)})"


def _restore(kind: type[Identity], values: Mapping[str, Any]) -> Identity:
    return kind(**values)


@frozen(kw_only=True, repr=False)
class Rank:
    """Which part of the model a process holds: its (index, size) along each kind of parallelism.

    Two processes hold the same part if all are equal, `dp` aside: replicas along data parallelism hold the same bytes,
    and each can be the seed of any other.

    Attributes:
        tp: tensor parallelism.
        pp: pipeline parallelism.
        ep: expert parallelism.
        cp: context parallelism.
        dp: data parallelism; for information, never compared.
    """

    tp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    pp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    ep: tuple[int, int] = field(default=(0, 1), validator=index_field)
    cp: tuple[int, int] = field(default=(0, 1), validator=index_field)
    dp: tuple[int, int] = field(default=(0, 1), validator=index_field)

    def differences(self, ours: "Rank") -> Differences:
        """Every coordinate but dp in which the seed's rank, this one, differs from ours."""
        pairs = {name: (getattr(self, name), getattr(ours, name)) for name in ("tp", "pp", "ep", "cp")}
        return {f"rank.{name}": pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def as_dict(self) -> dict[str, tuple[int, int]]:
        """Its coordinates by name."""
        return {one.name: getattr(self, one.name) for one in fields(Rank)}

    def __repr__(self) -> str:
        return f"Rank({', '.join(f'{name}={value}' for name, value in self.as_dict().items() if value != (0, 1))})"
