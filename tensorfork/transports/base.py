"""What a transport is: something that moves bytes between regions of two processes.

A transport knows regions, offsets and its own library. It never sees a model, a name or a dtype; matching, retries,
leases, generations and verification are above it. docs/transports.md says how to write one, and
`tensorfork.testing.TransportSuite` is the suite that each must pass.

All deadlines here are moments of `time.monotonic()`, in seconds. All sizes are bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, ClassVar, Protocol

from attrs import frozen

from tensorfork.regions import Copy, Place, Region, RemoteRegion

Facts = Mapping[str, Any]
"""What one side can do, as values msgpack carries: None, bool, int, float, str, bytes, lists and dicts of them."""


@frozen
class Site:
    """Where the seed is on the network: `bind`, the address to listen on; `host`, the name by which forks reach it."""

    bind: str
    host: str


class Channel(Protocol):
    """Messages between the two ends of one lease, over the bootstrap: authenticated, ordered, bounded (1 MiB each)."""

    def send(self, message: bytes, deadline: float) -> None:
        """Send; raises `PeerUnreachable` if the other side is gone."""

    def recv(self, deadline: float) -> bytes:
        """The next message; raises `PeerUnreachable` at the deadline or when the lease has ended."""


class Export(ABC):
    """The seed's side of one lease. Made by `Transport.export`; ended by `close`, once."""

    offer: bytes
    """What the fork's `open` needs: addresses, tokens, handles. At most 16 MiB."""

    @abstractmethod
    def serve(self, channel: Channel) -> None:
        """Serve until the lease ends. Runs on a thread of its own; a one-sided transport returns at once.

        Ends, without an error, when `close` is called from another thread.
        """

    @abstractmethod
    def close(self, deadline: float) -> bool:
        """Stop serving and let go of the memory. True if no reader can reach it any more, False if one still may."""


class Session(ABC):
    """The fork's side of one lease."""

    fabric: str
    """What the bytes travel over, for the report: tcp, nvlink, rdma, ..."""

    def ready(self, deadline: float) -> None:  # noqa: B027  # most are, once they are open
        """Called once, before the first pull, when the plans for it have been drawn up: wait for what was begun in
        `Transport.open` and can go on meanwhile. Raises as that does.
        """

    @abstractmethod
    def pull(
        self,
        copies: Sequence[Copy],
        deadline: float,
        done: Callable[[int], None],
        cancel: Event,
    ) -> None:
        """Make every copy, calling `done(i)` exactly once for copies[i], after its last byte has arrived.

        `done` is called on the caller's thread, in any order. For GPU memory, arrived means that work on any stream of
        this process sees the bytes.

        Raises:
            TransferFailed: at the deadline, when `cancel` is set, or when the other side fails. Nothing is written
                afterwards, but for what its `.undrained` names. Copies reported as done are whole.
        """

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Let go of connections, handles and memory. Safe after a failure, and a second time."""


class Transport(ABC):
    """One way to move bytes. Stateless, or safe to use from several threads: a seed serves many leases with one."""

    name: ClassVar[str]
    piece: int = 64 << 20
    """The longest copy it wants, in bytes: what is asked for is cut into pieces no longer, so progress and cancellation
    have somewhere to happen."""

    def facts(self, regions: Sequence[Region]) -> Facts:
        """What this side can do with this memory; travels to the other side. Quick, and changes nothing but what the
        transport remembers of the memory. A seed asks for it when it publishes, before any `export`.

        Raises `TransportUnavailable` where the transport cannot work in this process at all.
        """
        return {}

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """Pure: why these two cannot use this transport, with the remedy, or None if they can."""
        return None

    def forget(self, regions: Sequence[Region]) -> None:  # noqa: B027  # most keep nothing
        """The seed that offered these regions has closed. What was kept ready for further leases is let go of."""

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """The regions it would rather touch, and where in them each of the given ones begins.

        A transport whose library hands out whole allocations says so here (on both sides), and neighbours within one
        then merge into one copy. The default touches just what it is given.
        """
        return regions, [Place(region.id, 0) for region in regions]

    @abstractmethod
    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        """The seed's side: make `regions` readable by one fork, whose facts are given.

        Raises `TransportUnavailable` when it cannot, and leaves nothing behind.
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
        """The fork's side: get ready to read the `remote` regions into `regions`. `host` is where the seed is found.

        Raises `TransportUnavailable` when it cannot, `ProtocolError` for an offer that is none; leaves nothing behind.
        """
