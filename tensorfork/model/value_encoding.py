"""Values as they travel and are compared: numbers as they are, all else as hashes that the seed has salted."""

import enum
import struct
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeAlias

import msgpack

from tensorfork.model import value_kinds as kinds
from tensorfork.model.value_kinds import Array, Named
from tensorfork.model.values import Collection

Encoded: TypeAlias = "bool | int | float | bytes | list[float] | None"
"""A number of 64 bits, None, a complex number as two, or a hash."""

HASH = 16
"""Bytes of a hash, and of a salt."""
CHUNK = 1000
"""Entries of a collection that are hashed in a row."""
_NUMBERS = frozenset((bool, int, float, type(None)))
_AS_IT_IS = frozenset((bool, float, type(None)))
_INT64 = range(-(1 << 63), 1 << 63)


class Encoder:
    """Encodes values with one salt. Remembers the hashes of texts.

    Args:
        salt: `HASH` bytes.
        pause: called between two steps of hashing a long collection.
    """

    def __init__(self, salt: bytes, pause: Callable[[], object] = lambda: None) -> None:
        self.salt, self._pause = salt, pause
        self._known: dict[Any, bytes] = {}
        self._packer = msgpack.Packer(
            strict_types=True, default=_reduced, unicode_errors="surrogatepass", use_single_float=False
        )

    def encode(self, value: Any) -> Encoded:
        """A value that `read_values` has read, as it travels."""
        cls = type(value)
        if cls in _AS_IT_IS or (cls is int and value in _INT64):
            return value  # type: ignore[no-any-return]
        if cls is complex:
            return [value.real, value.imag]
        if cls is Collection:
            return self._hash(self._packed_entries(value))
        if cls is not str and cls is not Named:
            return self._hash([self._packer.pack(value)])
        known = self._known.get(value)
        if known is None:
            known = self._known[value] = self._hash([self._packer.pack(value)])
        return known

    def _hash(self, parts: "Iterator[bytes] | Sequence[bytes]") -> bytes:
        hashed = blake2b(digest_size=HASH, salt=self.salt)
        for part in parts:
            hashed.update(part)
        return hashed.digest()

    def _packed_entries(self, collection: Collection) -> Iterator[bytes]:
        entries = collection.entries
        yield self._packer.pack([len(entries), collection.is_ordered])
        if not collection.is_ordered:
            yield from sorted(map(self._packer.pack, entries))
            return
        iterator = iter(entries)
        while chunk := list(islice(iterator, CHUNK)):
            yield self._packer.pack(chunk)
            self._pause()


def are_encoded(values: Sequence[object]) -> bool:
    """Whether these are values as they travel."""
    return type(values) is list and all(type(one) in _NUMBERS or _is_hash_or_complex(one) for one in values)


def _is_hash_or_complex(value: object) -> bool:
    if type(value) is list:
        return len(value) == 2 and type(value[0]) is float and type(value[1]) is float
    return type(value) is bytes and len(value) == HASH


def same(one: Encoded, other: Encoded) -> bool:
    """Whether two are equal bit by bit: NaN is NaN, and 1, 1.0 and True are three."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, list) and isinstance(other, list):
        return struct.pack("<2d", *one) == struct.pack("<2d", *other)
    return one == other


def _reduced(value: Any) -> Any:
    """What msgpack does not know, in terms of what it does."""
    if type(value) is tuple:
        return list(value)
    if isinstance(value, enum.Enum):
        value = kinds.member_name(value)
    if isinstance(value, Named):
        return ["name", value.text]
    if isinstance(value, Array):
        return ["array", value.dtype, list(value.shape), value.content]
    if type(value) is int:
        return ["int", hex(value)]
    return [type(value).__name__, str(value)]  # torch's dtypes, devices and sizes, and complex numbers
