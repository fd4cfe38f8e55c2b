"""A lease, as a fork holds it: the seed's promise, and the session that reads under it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from attrs import frozen

from tensorfork.errors import (
    TensorForkError,
)
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.destination import DestinationMemory
from tensorfork.fork.strided import Scratch
from tensorfork.regions import Place
from tensorfork.transports.base import Session, Transport
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import ForkChannel

log = logging.getLogger("tensorfork")


@frozen
class Lease:
    """A seed's promise, and the session that reads under it."""

    id: bytes
    generation: int
    session: Session
    sizes: Mapping[int, int]
    """Bytes of each of the seed's regions."""
    theirs: Mapping[int, Place]
    ours: Mapping[int, Place]
    piece: int
    scratch: Scratch


@contextmanager
def lease(
    peer: SeedConnection,
    transport: Transport,
    memory: DestinationMemory,
    deadline: float,
    *,
    digests: bool,
    enter: Callable[[str], object],
) -> Iterator[Lease]:
    """Take a lease over a transport, and open a session under it; give both back at the end. The session gets ready
    while the caller looks at what it holds, and draws up the plans.

    `enter` is told the phase that begins. Raises `TransportUnavailable` where this transport turns out not to work.
    """
    enter("lease")
    scratch = Scratch.for_tensors(memory.gapped)
    given = [*memory.regions, *scratch.regions]
    regions, places = transport.cover(given)
    request = messages.TakeLease(
        transport.name, dict(transport.facts(given)), max(0.0, deadline - time.monotonic()), digests
    )
    taken, frames = peer.conversation.request(request, messages.Leased, deadline, "lease")
    try:
        remote = tables.unpack_regions(frames)
        enter("open")
        channel = ForkChannel(peer.conversation, taken.lease)
        host = peer.conversation.peer.host
        session = transport.open(taken.offer, host, remote, regions, channel, deadline)
        try:
            theirs = tables.unpack_places(frames)
            ours = {region.id: place for region, place in zip(given, places, strict=True)}
            sizes = {region.id: region.nbytes for region in remote}
            yield Lease(taken.lease, taken.generation, session, sizes, theirs, ours, transport.piece, scratch)
        finally:
            enter("close")
            session.close(deadline)
    finally:
        _release(peer, taken.lease, deadline)


def _release(peer: SeedConnection, id: bytes, deadline: float) -> None:
    """Give a lease back, best effort: it ends by itself too."""
    try:
        soon = min(max(deadline, time.monotonic() + 0.2), time.monotonic() + 2.0)
        peer.conversation.request(messages.CheckLease(id, True), messages.Checked, soon, "release")
    except TensorForkError as error:
        log.info("a lease was not given back: %s", error)
