"""Both ends of a lease without a model, a bootstrap or a seed: channels, and a seed's end in this process."""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from attrs import define, frozen

from tensorfork import Export, Facts, PeerUnreachable, Place, RemoteRegion, Site, Transport
from tensorfork.testing.memory import Memory

SITE = Site("127.0.0.1", "127.0.0.1")


class Speaker:
    """One end of a lease's channel, as the bootstrap would make it: what the other end says is put in with `hear`."""

    def __init__(self, say: Callable[[bytes], None]) -> None:
        self._say = say
        self._box: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.Channel`."""
        if len(message) > 1 << 20:
            raise ValueError("a message on a channel has at most 1 MiB")
        try:
            self._say(bytes(message))
        except OSError as error:
            raise PeerUnreachable(f"the other side is gone: {error}") from error

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.Channel`."""
        try:
            message = self._box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnreachable("nothing came on the channel by the deadline") from None
        if message is None:
            self._box.put(None)
            raise PeerUnreachable("the lease has ended")
        return message

    def hear(self, message: bytes) -> None:
        """Put in what the other end says."""
        self._box.put(message)

    def end(self) -> None:
        """The lease has ended: whoever waits is woken."""
        self._box.put(None)


@frozen
class Offer:
    """What a fork is told of a lease."""

    number: int
    offer: bytes
    remote: Sequence[RemoteRegion]
    places: Sequence[Place]


@frozen
class Ending:
    """How a lease ended, at the seed: what `Export.close` said, and whether `Export.serve` returned, and how."""

    closed: bool
    ended: bool
    error: str | None


@define
class _Served:
    export: Export
    speaker: Speaker
    thread: threading.Thread | None
    error: str | None = None


class SeedEnd(Protocol):
    """A seed's end of leases: here, or in another process."""

    def facts(self) -> Facts:
        """What the seed would say in its welcome."""

    def fill(self, number: int) -> None:
        """Change the contents of all regions."""

    def wrong(self) -> str | None:
        """See `Memory.wrong`."""

    def export(self, fork: Facts, seconds: float, serve: bool, fork_speaker: Speaker) -> tuple[Offer, Speaker]:
        """Grant a lease, as a seed does: cover, export, and serve on a thread. Also the fork's end of its channel."""

    def end(self, number: int, seconds: float) -> Ending:
        """End a lease, as a seed does."""


class LocalSeed:
    """A seed's end, in this process."""

    def __init__(self, transport: Transport, device: str, sizes: Sequence[int], number: int) -> None:
        self._transport, self.number = transport, number
        self._memory = Memory(device, sizes, number)
        self._served: dict[int, _Served] = {}

    def facts(self) -> Facts:
        """What the seed would say in its welcome."""
        return dict(self._transport.facts(self._memory.regions))

    def fill(self, number: int) -> None:
        """Change the contents of all regions."""
        self._memory.fill(number)

    def wrong(self) -> str | None:
        """See `Memory.wrong`."""
        return self._memory.wrong()

    def export(self, fork: Facts, seconds: float, serve: bool, fork_speaker: Speaker) -> tuple[Offer, Speaker]:
        """Grant a lease, as a seed does: cover, export, and serve on a thread. Also the fork's end of its channel."""
        mine = Speaker(fork_speaker.hear)
        fork_speaker._say = mine.hear
        return self.grant(fork, seconds, serve, mine), fork_speaker

    def grant(self, fork: Facts, seconds: float, serve: bool, speaker: Speaker) -> Offer:
        """The same, with a channel that is there already."""
        regions, places = self._transport.cover(self._memory.regions)
        export = self._transport.export(regions, SITE, fork, time.monotonic() + seconds)
        number = len(self._served)
        served = self._served[number] = _Served(export, speaker, None)
        remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
        if serve:
            served.thread = threading.Thread(target=_serve, args=(served,), name="suite-serve", daemon=True)
            served.thread.start()
        return Offer(number, bytes(export.offer), remote, list(places))

    def end(self, number: int, seconds: float) -> Ending:
        """End a lease, as a seed does."""
        served = self._served[number]
        served.speaker.end()
        closed = served.export.close(time.monotonic() + seconds)
        if served.thread is None:  # serving only begins: it must see that it is over
            served.thread = threading.Thread(target=_serve, args=(served,), name="suite-serve", daemon=True)
            served.thread.start()
        served.thread.join(seconds)
        return Ending(closed, not served.thread.is_alive(), served.error)


def _serve(served: _Served) -> None:
    try:
        served.export.serve(served.speaker)
    except PeerUnreachable:
        pass  # said by the channel when the fork is gone or the lease has ended; a seed takes that for the end too
    except BaseException:
        served.error = traceback.format_exc()
