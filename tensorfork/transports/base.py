"""The contract of a transport, which moves bytes between regions of two processes.

A transport knows regions, offsets and its own library. It never sees a model, a name or a dtype; matching, retries,
leases, generations and verification are above it. docs/transports.md says how to write one, and every transport must
pass `tensorfork.testing.TransportSuite`.

All deadlines here are moments of `time.monotonic()`, in seconds. All sizes are bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, ClassVar, Literal, Protocol

from attrs import field, frozen

from tensorfork.regions import Copy, Place, Region, RemoteRegion
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import Port
from tensorfork.transports.rate_limit import RateLimiter, limited_piece

Facts = Mapping[str, Any]
"""What one side can do, as values that msgpack carries: None, bool, int, float, str, bytes, lists and dicts of them."""


@frozen
class Site:
    """What a seed has for all its leases, whatever their transports.

    Attributes:
        bind: the address to listen on.
        host: the name by which forks reach it.
        limiter: the seed's rate limit. Where the seed sends the bytes, a lease asks its `share` before each piece; one
            without a limit counts them all the same.
        port: the seed's own port, which a transport may serve on as well; a fork's `open` is told where that is.
        stall: seconds without a sign of life after which a fork counts as gone.
    """

    bind: str
    host: str
    limiter: RateLimiter = field(factory=RateLimiter, eq=False, repr=False, kw_only=True)
    port: Port | None = field(default=None, kw_only=True)
    stall: float = field(default=15.0, kw_only=True)


class Channel(Protocol):
    """Messages between the two ends of one lease, in order, of at most 1 MiB each. Of a seed's messages 1.5 MiB may
    wait to be read by the fork, of a fork's 64 messages; beyond that the lease is lost.

    They travel over the conversation's connection, in plaintext, each with the lease's id. That id, 16 random bytes, is
    all that distinguishes them from a stranger's messages: nothing is encrypted or authenticated, so whoever can read
    the connection's packets can read the messages and forge others.
    """

    @property
    def rate_limit(self) -> float | None:
        """On the fork, bytes a second that the seed has it read at most, over all its copies; None for no limit.

        It changes while messages are received, as other leases begin and end: who reads by himself receives every 20 ms
        or so, and obeys the new one from then on. For any thread.
        """

    @property
    def seed(self) -> Address:
        """On the fork: the numeric address of the seed's port, at which it has answered. Other connections to the seed
        go there: another address of the same name may be another seed.
        """

    def send(self, message: bytes, deadline: float) -> None:
        """Send one message. Raises `PeerUnreachable` if the other side is gone."""

    def recv(self, deadline: float) -> bytes:
        """Return the next message. Raises `PeerUnreachable` at the deadline, `LeaseEnded` when the lease has ended.

        To a fork's transport, its lease has ended when the fork is cancelled, too.
        """

    def check(self) -> None:
        """Raise `LeaseEnded` if this side has ended the lease: on a fork that was cancelled, or whose seed is gone.
        Never waits.

        For any thread, and for what waits in `Transport.open` or `Session.ready` for something else than a message:
        call it every 0.2 s or so.
        """


class Export(ABC):
    """The seed's side of one lease. Created by `Transport.export`; `close` is called once, at its end."""

    offer: bytes
    """What the fork's `open` needs, such as addresses, tokens and handles. At most 16 MiB."""

    @abstractmethod
    def serve(self, channel: Channel) -> None:
        """Serve until the lease ends. Called on a thread of its own; a one-sided transport returns at once.

        Returns, without an error, when `close` is called from another thread.
        """

    @abstractmethod
    def close(self, deadline: float) -> bool:
        """Stop serving and release the memory, by the deadline. The channel can still be used, unless the fork is gone.

        Returns True if no fork can reach the memory any more, False if one still may.
        """


class Session(ABC):
    """The fork's side of one lease."""

    fabric: str
    """What the bytes travel over, for the report: tcp, nvlink, rdma and the like."""

    def ready(self, deadline: float) -> None:  # noqa: B027  # most sessions have nothing to wait for
        """Wait for what `Transport.open` began in the background. Called once, before the first pull; between the two
        the fork prepares its copies. Raises what `open` raises.
        """

    @abstractmethod
    def pull(
        self,
        copies: Sequence[Copy],
        deadline: float,
        done: Callable[[int], None],
        cancel: Event,
    ) -> None:
        """Make every copy, and call `done(i)` exactly once for copies[i], after its last byte has arrived.

        `done` is called on the caller's thread, in any order. An error that it raises ends the pull and reaches the
        caller. For GPU memory, arrived means that work on any stream of this process sees the bytes.

        Raises:
            TransferFailed: at the deadline, when `cancel` is set, when the other side fails, or for a copy outside the
                regions. Nothing is written afterwards, except to memory that `.undrained` names. Copies reported as
                done are complete.
        """

    def expect_last_pull(self) -> None:  # noqa: B027  # most sessions close at once
        """Only one more pull follows. What its copies have no use for any more may be released while it runs, in the
        background; `close` waits for that.
        """

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Release connections, handles and memory. Can be called after a failure, and more than once."""


class Transport(ABC):
    """One way to move bytes. A seed serves many leases with one object, so it is stateless, or thread-safe."""

    name: ClassVar[str]
    piece: int = 64 << 20
    """The longest copy that `pull` is given, in bytes. Longer ones are cut, so that progress is reported and a transfer
    can be cancelled between the pieces."""
    rate_limited_by: ClassVar[Literal["seed", "fork"] | None] = None
    """Who holds the rate limit of a seed: the seed itself, where each `Export` asks `Site.limiter` before it sends; or
    each fork, where each `Session` obeys `Channel.rate_limit`. A seed with a rate limit does not offer a transport over
    which nobody does."""

    def facts(self, regions: Sequence[Region]) -> Facts:
        """What this side can do with this memory. The other side gets it as an argument of `why_not`.

        It must be quick, and may change nothing but what the transport remembers about the memory. A seed calls it when
        it publishes, before any `export`.

        Raises `TransportUnavailable` if the transport cannot work in this process at all.
        """
        return {}

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """Why these two cannot use this transport, with the remedy, or None if they can. A pure function."""
        return None

    def forget(self, regions: Sequence[Region]) -> None:  # noqa: B027  # most keep nothing
        """Release what is kept for further leases on these regions, the memory's registrations too.

        Called when the seed has closed or was suspended, or has published other memory. Leases on them are being ended.
        """

    def limited_piece(self, rate: float) -> int:
        """What `piece` is under a limit of so many bytes a second."""
        return limited_piece(self.piece, rate)

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """The regions that the transport prefers, and the place in them at which each of the given ones begins.

        A transport whose library exports whole allocations returns those, on both sides; copies of neighbouring bytes
        within one allocation are then merged. The default returns the given regions.
        """
        return regions, [Place(region.id, 0) for region in regions]

    @abstractmethod
    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        """On the seed: make `regions` readable by one fork, whose facts are given.

        Raises `TransportUnavailable` if that is impossible; nothing is left open then.
        """

    @abstractmethod
    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> Session:
        """On the fork: prepare to read the `remote` regions into `regions`. `host` is the seed's host name or address.

        Raises `TransportUnavailable` if that is impossible, `ProtocolError` if the offer makes no sense; nothing is
        left open then.
        """
