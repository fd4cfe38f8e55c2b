"""The messages between a fork and a seed: attrs classes to msgpack and back, versioned and bounded.

A frame is ``[MAGIC, VERSION, number, kind, body]`` in msgpack. `number` is the fork's; a reply carries that of its
request. Big tables (a layout, digests) travel behind a reply as frames of their own, in pages, so that making or
sending one never holds the interpreter for long. Nothing is ever unpickled, and what does not have exactly the
declared shape is refused before it is looked at further.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, get_args

import msgpack
from attrs import field, frozen
from attrs.validators import ge, le, max_len
from cattrs import Converter
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn

from tensorfork.errors import ProtocolError
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, StorageLayout, TensorLayout
from tensorfork.placement import Placement
from tensorfork.transports.base import Place, RemoteRegion

MAGIC = "tensorfork"
VERSION = 1

MAX_REQUEST = 64 << 10
"""Bytes of a request; unpacking one made to be slow takes a few milliseconds of the seed's interpreter at most."""
MAX_REPLY = 32 << 20
"""Bytes of a frame to a fork."""
MAX_FRAMES = 4096
MAX_TENSORS = 1_000_000
MAX_MESSAGE = 1 << 20
"""Bytes of a message on a channel."""
MAX_OFFER = 16 << 20
PAGE = 500
"""Tensors, or storages, in one frame: packed in well under a millisecond."""

_DEVICE = re.compile(r"cpu|cuda:\d{1,4}")
_short: Any = max_len(4096)
_count = [ge(0), le(MAX_TENSORS)]


@frozen
class Hello:
    """The first words of a fork."""

    library: str = field(validator=_short)


@frozen
class Offered:
    """One transport, as the seed sees it: its facts, or why it cannot."""

    facts: dict[str, Any]
    why_not: str | None


@frozen
class Welcome:
    """The seed's answer: what it has, and how it can be had."""

    library: str = field(validator=_short)
    seed: bytes = field(validator=max_len(64))
    tensors: int = field(validator=_count)
    storages: int = field(validator=_count)
    nbytes: int = field(validator=ge(0))
    digest: str = field(validator=_short)
    transports: dict[str, Offered]
    identity: dict[str, Any] | None = None
    rank: dict[str, Any] | None = None


@frozen
class GetLayout:
    """Asks for every tensor and storage, and the names of what was left out; answered by `Pages`."""


@frozen
class Pages:
    """Says that so many frames follow."""

    tensors: int = field(validator=[ge(0), le(MAX_FRAMES)])
    storages: int = field(validator=[ge(0), le(MAX_FRAMES)])
    left_out: int = field(validator=[ge(0), le(MAX_FRAMES)])


@frozen
class TakeLease:
    """Asks for the memory to stay where it is for so many seconds, reachable through a transport."""

    transport: str = field(validator=_short)
    facts: dict[str, Any]
    seconds: float = field(validator=[ge(0.0), le(86400.0)])
    digests: bool
    """Whether digests will be asked for, so that the seed can begin with them."""


@frozen
class Leased:
    """A lease. Of the pages behind it the first has the regions, the others each storage's place in them."""

    lease: bytes = field(validator=max_len(64))
    generation: int
    offer: bytes = field(validator=max_len(MAX_OFFER))
    pages: int = field(validator=[ge(0), le(MAX_FRAMES)])


@frozen
class Say:
    """The frame behind is a message on a lease's channel; either way, and never answered."""

    lease: bytes = field(validator=max_len(64))


@frozen
class GetDigests:
    """Asks for the digest of every tensor at the lease's generation; answered, when computed, by `Digests`."""

    lease: bytes = field(validator=max_len(64))


@frozen
class Digests:
    """So many frames of 8-byte little-endian digests follow, in the layout's order."""

    generation: int
    frames: int = field(validator=[ge(0), le(MAX_FRAMES)])


@frozen
class CheckLease:
    """Asks for the generation as it is now; `release` ends the lease as well."""

    lease: bytes = field(validator=max_len(64))
    release: bool


@frozen
class Checked:
    """The generation as it is now."""

    generation: int


@frozen
class Refused:
    """No, and why. `code` is one of CODES."""

    code: str = field(validator=_short)
    reason: str = field(validator=max_len(65536))


VERSION_CODE, UNAVAILABLE, CHANGED, BUSY, UNKNOWN, MALFORMED = CODES = (
    "version",
    "unavailable",
    "changed",
    "busy",
    "unknown-lease",
    "malformed",
)

Request = Hello | GetLayout | TakeLease | Say | GetDigests | CheckLease
Reply = Welcome | Pages | Leased | Say | Digests | Checked | Refused
Message = Request | Reply

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}
REQUESTS: tuple[type[Any], ...] = get_args(Request)
REPLIES: tuple[type[Any], ...] = get_args(Reply)

T = TypeVar("T")


def encode(message: Message, number: int) -> bytes:
    """One frame."""
    body = _converter.unstructure(message)
    packed: bytes = msgpack.packb([MAGIC, VERSION, number, type(message).__name__, body])
    return packed


def decode(frame: bytes | memoryview, expected: tuple[type[Any], ...]) -> tuple[int, Any]:
    """The number and the message of a frame.

    Raises:
        OtherVersion: it is tensorfork's, of another version; its number is kept, as that of a `Malformed` one is.
        ProtocolError: it is anything else than one of the expected messages.
    """
    envelope = _unpack(frame)
    if not isinstance(envelope, list) or len(envelope) < 3 or envelope[0] != MAGIC:
        raise ProtocolError("what came is not a tensorfork message")
    if envelope[1] != VERSION:
        raise OtherVersion(envelope[1], envelope[2] if type(envelope[2]) is int else 0)
    if len(envelope) != 5 or type(envelope[2]) is not int or not isinstance(envelope[3], str):
        raise ProtocolError("what came is not a tensorfork message")
    kind = _KINDS.get(envelope[3])
    if kind not in expected:
        raise Malformed(f"a {envelope[3][:40]!r} came where none is expected", envelope[2])
    try:
        return envelope[2], _converter.structure(envelope[4], kind)
    except Exception as error:  # cattrs has no common base for what it raises on bad values
        raise Malformed(f"a malformed {envelope[3]} came: {_words(error)}", envelope[2]) from error


class Malformed(ProtocolError):
    """A message whose number can be read, and the rest cannot."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def _words(error: Exception) -> str:
    """What it says, if it can: an error of cattrs about names that are not texts fails once more when it is printed."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


class OtherVersion(ProtocolError):
    """A message of another version of this protocol."""

    def __init__(self, version: object, number: int) -> None:
        super().__init__(f"it speaks version {str(version)[:20]} of the tensorfork protocol, and we speak {VERSION}")
        self.number = number


def pack_layout(layout: ModelLayout) -> tuple[Pages, list[bytes]]:
    """A layout as pages of columns, and how many there are of each kind."""
    tensors, storages = _pack_tensors(layout.tensors), _pack_storages(layout.storages)
    left_out = [msgpack.packb([page]) for page in _paged(layout.left_out)]
    return Pages(len(tensors), len(storages), len(left_out)), [*tensors, *storages, *left_out]


def _pack_tensors(tensors: Sequence[TensorLayout]) -> list[bytes]:
    return [
        msgpack.packb(
            [
                [t.name for t in page],
                [t.dtype for t in page],
                [t.shape for t in page],
                [t.stride for t in page],
                [t.storage for t in page],
                [t.offset for t in page],
                [None if t.placement is None else [t.placement.shape, t.placement.how] for t in page],
            ]
        )
        for page in _paged(tensors)
    ]


def _pack_storages(storages: Sequence[StorageLayout]) -> list[bytes]:
    return [msgpack.packb([[s.nbytes for s in page], [s.device for s in page]]) for page in _paged(storages)]


def unpack_layout(pages: Pages, frames: Sequence[bytes], welcome: Welcome) -> ModelLayout:
    """The layout from its pages. Raises `ProtocolError` unless every value has its type and place."""

    def tensor(name: Any, dtype: Any, shape: Any, stride: Any, storage: Any, offset: Any, part: Any) -> TensorLayout:
        placement = None if part is None else Placement(_tuple(part[0]), part[1])
        return TensorLayout(name, dtype, _tuple(shape), _tuple(stride), storage, offset, placement)

    def storage(nbytes: Any, device: Any) -> StorageLayout:
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise ValueError(f"{str(device)[:40]!r} is not a device that a seed can have")
        return StorageLayout(nbytes, device)

    with _Reading("layout"):
        if len(frames) != pages.tensors + pages.storages + pages.left_out:
            raise ValueError(f"it has {len(frames)} pages, and others were announced")
        storages, left_out = pages.tensors, pages.tensors + pages.storages
        return ModelLayout(
            tuple(_rows(frames[:storages], 7, tensor)),
            tuple(_rows(frames[storages:left_out], 2, storage)),
            tuple(_rows(frames[left_out:], 1, _text)),
            *unpack_identity(welcome),
        )


def unpack_identity(welcome: Welcome) -> tuple[Identity | None, Rank | None]:
    """What the seed says it is; raises `ProtocolError`."""
    with _Reading("identity"):
        return (
            None if welcome.identity is None else Identity(**welcome.identity),
            None if welcome.rank is None else Rank(**{name: tuple(value) for name, value in welcome.rank.items()}),
        )


def pack_places(regions: Sequence[RemoteRegion], places: Mapping[int, Place]) -> list[bytes]:
    """Regions, then each storage's place in them; as pages, how many are the regions' first."""
    region_pages = [
        msgpack.packb([[r.id for r in page], [r.nbytes for r in page], [r.device for r in page]])
        for page in _paged(regions)
    ]
    place_pages = [
        msgpack.packb([[i for i, _ in page], [p.region for _, p in page], [p.offset for _, p in page]])
        for page in _paged(list(places.items()))
    ]
    return [msgpack.packb(len(region_pages)), *region_pages, *place_pages]


def unpack_regions(pages: Sequence[bytes]) -> list[RemoteRegion]:
    """The regions that `pack_places` packed; raises `ProtocolError`."""

    def region(id: Any, nbytes: Any, device: Any) -> RemoteRegion:
        return RemoteRegion(_natural(id), _natural(nbytes), _text(device))

    with _Reading("table of regions"):
        return list(_rows(pages[1 : 1 + _natural(_unpack(pages[0]))], 3, region))


def unpack_places(pages: Sequence[bytes]) -> dict[int, Place]:
    """The places that it packed beside them, by storage; raises `ProtocolError`."""

    def place(storage: Any, region: Any, offset: Any) -> tuple[int, Place]:
        return _natural(storage), Place(_natural(region), _natural(offset))

    with _Reading("table of places"):
        return dict(_rows(pages[1 + _natural(_unpack(pages[0])) :], 3, place))


def pack_digests(values: Sequence[int]) -> list[bytes]:
    """Digests as frames."""
    return [b"".join(value.to_bytes(8, "little") for value in page) for page in _paged(values)]


def unpack_digests(frames: Sequence[bytes], count: int) -> list[int]:
    """`count` digests; raises `ProtocolError` for another number of them."""
    whole = b"".join(frames)
    if len(whole) != 8 * count:
        raise ProtocolError(f"{len(whole)} bytes of digests came for {count} tensors")
    return [int.from_bytes(whole[i : i + 8], "little") for i in range(0, len(whole), 8)]


class _Reading:
    """Whatever goes wrong inside is the peer's doing."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError | TypeError | LookupError):
            raise ProtocolError(f"a malformed {self._what} came: {error}") from error


def _paged(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while page := list(islice(left, PAGE)):
        yield page


def _rows(pages: Sequence[bytes], columns: int, make: Callable[..., T]) -> Iterator[T]:
    total = 0
    for page in pages:
        table = _unpack(page)
        if not isinstance(table, list) or len(table) != columns or len({len(column) for column in table}) != 1:
            raise ValueError("its columns are not of one length")
        total += len(table[0])
        if total > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS:,} rows")
        yield from map(make, *table)


def _unpack(frame: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=True)
    except Exception as error:  # msgpack has no common base for what it raises on bad bytes
        raise ProtocolError(f"what came is not msgpack: {type(error).__name__} {error}") from error


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise ValueError(f"{str(value)[:40]!r} is not a list")
    return tuple(value)


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 4096:
        raise ValueError("not a short text")
    return value


def _make_converter() -> Converter:
    """Strict: cattrs would turn "1" into 1 and drop fields it does not know."""
    converter = Converter(forbid_extra_keys=True, detailed_validation=False)

    def exactly(kind: type[Any]) -> Callable[[Any, Any], Any]:
        def structure(value: Any, _: Any) -> Any:
            if type(value) is not kind:
                raise ValueError(f"{kind.__name__} expected, {type(value).__name__} came")
            return value

        return structure

    for plain in (int, str, bytes, bool, float):
        converter.register_structure_hook(plain, exactly(plain))
    converter.register_unstructure_hook(bytes, lambda value: value)
    converter.register_structure_hook_func(lambda kind: kind == dict[str, Any], exactly(dict))
    converter.register_unstructure_hook_func(lambda kind: kind == dict[str, Any], lambda value: value)
    for kind in {*_KINDS.values(), Offered}:
        converter.register_structure_hook(kind, make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True))
        converter.register_unstructure_hook(kind, make_dict_unstructure_fn(kind, converter))
    return converter


_converter = _make_converter()
