"""The messages between a fork and a seed: attrs classes to msgpack and back, versioned and bounded.

A frame is ``[MAGIC, VERSION, number, kind, body]`` in msgpack. The fork numbers its requests, and a reply has the
number of its request. Large tables (a layout, digests) travel behind a reply as frames of their own, in pages, so that
packing or sending one never holds the interpreter for long. Nothing is ever unpickled. A message of an unknown kind is
refused, and one that lacks a field, or has one of another type; fields that are not declared are skipped. What may be
added under the same version, and what needs another one: docs/decisions.md, "Additions to the wire".
"""

import math
from itertools import pairwise
from typing import Any, get_args

import msgpack
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, max_len, optional

from tensorfork.errors import ProtocolError
from tensorfork.validators import DAY, is_natural, is_text
from tensorfork.wire.records import Record, from_plain, to_plain

MAGIC = "tensorfork"

VERSION = 4

MAX_REQUEST = 64 << 10
"""Bytes of a request. Even one made to be slow is unpacked in a few milliseconds of the seed's interpreter."""

MAX_REPLY = 16 << 20
"""Bytes of a frame to a fork: a transport's offer. No other frame has more than `MAX_MESSAGE`."""

MAX_FRAMES = 4096
"""Frames behind one reply, of each kind."""

MAX_TENSORS = 1_000_000

MAX_MESSAGE = 1 << 20
"""Bytes of a message, with what is said on a channel, or of a page. What is made to be large takes 64 times as much
memory when it is unpacked.
"""

MOST_BYTES, MOST_BYTES_A_ROW = 2 << 20, 512
"""Bytes of all pages of a reply: so many, and so many for each row that was announced, such as a tensor."""

NO_TRANSPORT = ""
"""What `TakeLease` names where no bytes are to be moved."""

MAX_NAMES = 100
"""Names of tensors in a refusal."""

MAX_PIECES_OF = 100
"""Tensors of which the pieces are asked for at once."""

_short: Any = max_len(4096)

_count = [ge(0), le(MAX_TENSORS)]

_rate = [gt(0.0), lt(math.inf)]  # nan is neither


def _names(instance: object, attribute: Any, value: list[Any]) -> None:
    if len(value) > MAX_NAMES or not all(map(is_text, value)):
        raise ValueError(f"{attribute.name} must be at most {MAX_NAMES} short texts")


def _rising(instance: object, attribute: Any, value: list[Any]) -> None:
    natural = len(value) <= MAX_PIECES_OF and all(map(is_natural, value))
    if not natural or any(one >= other for one, other in pairwise(value)):
        raise ValueError(f"{attribute.name} must be at most {MAX_PIECES_OF} natural numbers, each above the last one")


@frozen(eq=False, repr=False)
class Hello(Record):
    """A fork's first message."""

    library: str = field(validator=_short)


@frozen(eq=False, repr=False)
class Offered(Record):
    """One transport at the seed: its facts, or why it cannot work there."""

    facts: dict[str, Any]
    why_not: str | None


@frozen(eq=False, repr=False)
class WeightsVersion(Record):
    """A `tensorfork.lineage.Version`."""

    lineage: str = field(validator=_short)
    counter: int = field(validator=ge(0))
    label: str | None = field(default=None, validator=optional(_short))
    content: str | None = field(default=None, validator=optional(_short))


@frozen(eq=False, repr=False)
class Welcome(Record):
    """The reply to `Hello`: what the seed has published, and the transports that it offers.

    `publication` numbers what the seed has published in turn: another number is another layout, or other memory.
    `tensors`, `storages` and `left_out` are how many the layout has.
    """

    library: str = field(validator=_short)
    seed: bytes = field(validator=max_len(64))
    tensors: int = field(validator=_count)
    storages: int = field(validator=_count)
    nbytes: int = field(validator=ge(0))
    digest: str = field(validator=_short)
    transports: dict[str, Offered]
    publication: int
    version: WeightsVersion
    identity: dict[str, Any] | None = None
    rank: dict[str, Any] | None = None
    left_out: int = field(default=0, validator=_count)


@frozen(eq=False, repr=False)
class GetLayout(Record):
    """Asks for every tensor and storage, and the names of the tensors left out. The reply is `Pages`.

    Refused as `CHANGED` where the seed has published something else than `publication`; None takes what there is.
    """

    publication: int | None = None


@frozen(eq=False, repr=False)
class Pages(Record):
    """The reply to `GetLayout`: the number of frames of each kind that follow."""

    tensors: int = field(validator=[ge(0), le(MAX_FRAMES)])
    storages: int = field(validator=[ge(0), le(MAX_FRAMES)])
    left_out: int = field(validator=[ge(0), le(MAX_FRAMES)])


@frozen(eq=False, repr=False)
class TakeLease(Record):
    """Asks for a lease: the memory stays where it is for so many seconds, readable over a transport. See `Leased`."""

    transport: str = field(validator=_short)
    """A name that the seed offers; or `NO_TRANSPORT`, for a lease under which only digests are asked for."""
    facts: dict[str, Any]
    seconds: float = field(validator=[ge(0.0), le(DAY)])
    digests: bool
    """Whether digests will be asked for, so that the seed can begin to compute them."""
    publication: int | None = None
    """What the fork's layout is of. Refused as `CHANGED` where the seed has published something else since."""
    values: bool = False
    """Whether to send the plain values beside the tensors."""
    trace: bytes = field(default=b"", validator=max_len(16))
    """The fork's trace id, for the logs."""


@frozen(eq=False, repr=False)
class Leased(Record):
    """The reply to `TakeLease`. Behind it come the transport's offer, and so many pages of regions, of places
    (`tables.pack_places`) and of plain values.

    `values` is None unless they were asked for and the seed has any. Their hashes are made with the salt. `beyond` is
    how many the seed has not looked at.

    `rate_limit` is the seed's, in bytes a second, for all its leases together; None for no limit. `share` is what this
    fork is to obey, where it reads by itself; `ChangeShare` changes it.
    """

    lease: bytes = field(validator=max_len(64))
    generation: int
    regions: int = field(validator=[ge(0), le(MAX_FRAMES)])
    places: int = field(validator=[ge(0), le(MAX_FRAMES)])
    version: WeightsVersion
    values: int | None = field(default=None, validator=optional([ge(0), le(MAX_FRAMES)]))
    salt: bytes = field(default=b"", validator=max_len(16))
    beyond: int = field(default=0, validator=ge(0))
    rate_limit: float | None = field(default=None, validator=optional(_rate))
    share: float | None = field(default=None, validator=optional(_rate))


@frozen(eq=False, repr=False)
class ChangeShare(Record):
    """Says that a fork, which reads by itself, is to read at most so many bytes a second from now on."""

    lease: bytes = field(validator=max_len(64))
    share: float = field(validator=_rate)


@frozen(eq=False, repr=False)
class Say(Record):
    """The frame behind is a message on a lease's channel. Sent in both directions, without a reply."""

    lease: bytes = field(validator=max_len(64))


@frozen(eq=False, repr=False)
class GetDigests(Record):
    """Asks for the digest of every tensor at the lease's generation. `Digests` is the reply, once they are computed."""

    lease: bytes = field(validator=max_len(64))


@frozen(eq=False, repr=False)
class Digests(Record):
    """The reply to `GetDigests`: so many frames of 8-byte little-endian digests follow, in the layout's order."""

    generation: int
    frames: int = field(validator=[ge(0), le(MAX_FRAMES)])


@frozen(eq=False, repr=False)
class GetPieces(Record):
    """Asks for the digests of some tensors' pieces at the lease's generation. `Pieces` is the reply, once they are
    computed: the root over a tensor's is its digest. Refused as `MALFORMED` where there is no such tensor.
    """

    lease: bytes = field(validator=max_len(64))
    tensors: list[Any] = field(validator=_rising)
    """Where they stand in the layout, rising: `MAX_PIECES_OF` at most."""


@frozen(eq=False, repr=False)
class Pieces(Record):
    """The reply to `GetPieces`. A frame for each tensor follows, of 8-byte little-endian digests."""

    generation: int


@frozen(eq=False, repr=False)
class CheckLease(Record):
    """Asks for the current generation; `release` ends the lease as well. The reply is `Checked`.

    Without `release` the seed looks whether its tensors still lie where they were published, and refuses as `MOVED`
    if not.
    """

    lease: bytes = field(validator=max_len(64))
    release: bool


@frozen(eq=False, repr=False)
class Checked(Record):
    """The current generation: the reply to `CheckLease`."""

    generation: int


@frozen(eq=False, repr=False)
class Refused(Record):
    """The reply to a request that is refused, with the reason. `code` is one of CODES.

    `tensors` are the names of those concerned, `MAX_NAMES` at most.
    """

    code: str = field(validator=_short)
    reason: str = field(validator=max_len(65536))
    tensors: list[Any] = field(factory=list, validator=_names)


@frozen(eq=False, repr=False)
class Ended(Record):
    """Says that a lease has ended, and why: when the seed ends it, and to what is said on its channel afterwards."""

    lease: bytes = field(validator=max_len(64))
    why: Refused


VERSION_CODE, UNAVAILABLE, CHANGED, MOVED, ASLEEP, BUSY, UNKNOWN, MALFORMED = CODES = (
    "version",
    "unavailable",
    "changed",
    "moved",
    "asleep",
    "busy",
    "unknown-lease",
    "malformed",
)

Request = Hello | GetLayout | TakeLease | Say | GetDigests | GetPieces | CheckLease

Reply = Welcome | Pages | Leased | ChangeShare | Say | Digests | Pieces | Checked | Refused | Ended

Message = Request | Reply

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}

REQUESTS: tuple[type[Any], ...] = get_args(Request)

REPLIES: tuple[type[Any], ...] = get_args(Reply)


def check_channel_message(message: bytes) -> bytes:
    """The message, if it is short enough; else `ValueError`, since the other side would close the connection."""
    if len(message) > MAX_MESSAGE:
        raise ValueError(f"a message on a channel has at most {MAX_MESSAGE:,} bytes, not {len(message):,}")
    return message


def encode(message: Message, number: int) -> bytes:
    """A message as one frame."""
    body = to_plain(message)
    packed: bytes = msgpack.packb([MAGIC, VERSION, number, type(message).__name__, body])
    return packed


def decode(frame: bytes | memoryview, expected: tuple[type[Any], ...]) -> tuple[int, Any]:
    """The number and the message of a frame.

    Raises:
        OtherVersion: it is a tensorfork message of another version; the error has its number.
        Malformed: its number can be read, but it is not one of the expected messages.
        ProtocolError: it is not a tensorfork message.
    """
    envelope = unpack(frame)
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
        return envelope[2], from_plain(kind, envelope[4])
    except Exception as error:  # a validator's, or one of the values' own
        raise Malformed(f"a malformed {envelope[3]} came: {_text_of(error)}", envelope[2]) from error


class Malformed(ProtocolError):
    """A message that cannot be read, except for its number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def _text_of(error: Exception) -> str:
    """The error's text, or else its type: an error about values of a peer's may fail when it is printed."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


class OtherVersion(ProtocolError):
    """A message of another version of this protocol."""

    def __init__(self, version: object, number: int) -> None:
        super().__init__(f"it speaks version {str(version)[:20]} of the tensorfork protocol, and we speak {VERSION}")
        self.number = number


def unpack(frame: bytes | memoryview) -> Any:
    """Unpack a frame's msgpack; raises `ProtocolError`."""
    try:
        return msgpack.unpackb(frame, raw=False, strict_map_key=True, use_list=True)
    except Exception as error:  # msgpack has no common base for what it raises on bad bytes
        raise ProtocolError(f"what came is not msgpack: {type(error).__name__} {error}") from error
