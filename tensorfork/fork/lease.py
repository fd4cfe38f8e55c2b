"""A lease, as the fork holds it: the seed's promise, and the session that reads under it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from attrs import frozen

from tensorfork.errors import (
    PeerUnreachable,
    ProtocolError,
    SeedAsleep,
    SeedChanged,
    SeedMoved,
    TensorForkError,
    TransferFailed,
    TransportUnavailable,
)
from tensorfork.exhaustion import exhausted
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.destination import DestinationMemory
from tensorfork.fork.strided import Scratch
from tensorfork.fork.values import OurValues, SeedValues
from tensorfork.regions import Place
from tensorfork.transports.base import Session, Transport
from tensorfork.wire import messages, tables
from tensorfork.wire.fork_channel import ForkChannel

log = logging.getLogger("tensorfork")

CLOSE_TIMEOUT = 2.0
"""Seconds that a session may take to close, whatever the fork's deadline."""
CANCELLED_TIMEOUT = 0.1
"""Seconds in which a session of a fork that was cancelled must close, and the seed confirm that its lease is back."""


@frozen(eq=False, repr=False)
class Lease:
    """A lease, and the session that reads under it.

    Attributes:
        id: what messages about the lease carry.
        generation: the seed's generation when the lease was granted.
        session: the transport's, open.
        sizes: bytes of each of the seed's regions.
        theirs: where each of the seed's storages begins in its regions.
        ours: where each of our storages begins in our regions.
        piece: the longest copy that the transport wants, in bytes.
        scratch: for strided tensors.
        version: which weights are leased.
        values: the seed's plain values; None if it has none, or was not asked.
        rate_limit: the seed's for all its forks, in bytes a second; None if it has none.
    """

    id: bytes
    generation: int
    session: Session
    sizes: Mapping[int, int]
    theirs: Mapping[int, Place]
    ours: Mapping[int, Place]
    piece: int
    scratch: Scratch
    version: messages.WeightsVersion
    values: SeedValues | None
    rate_limit: float | None


@contextmanager
def take_lease(
    seed: SeedConnection,
    transport: Transport,
    memory: DestinationMemory,
    deadline: float,
    *,
    digests: bool,
    values: OurValues | None,
    trace: str,
    enter: Callable[[str], object],
) -> Iterator[Lease]:
    """Take a lease over a transport, and open a session under it; close both at the end.

    The session may still be getting ready inside the `with` block: call `get_ready` before the first pull. `enter` is
    called with the name of each phase that begins. With `values` the seed's are asked for, and ours read meanwhile.
    Raises `TransportUnavailable` where the transport does not work, `ResourceExhausted` where there is nothing left
    for it.
    """
    enter("lease")
    scratch = Scratch.for_tensors(memory.gapped, seed.check)
    storages = [*memory.regions, *scratch.regions]
    with _opening(transport):
        regions, places = transport.cover(storages)
        facts = dict(transport.facts(storages))
    request = messages.TakeLease(
        transport.name,
        facts,
        max(0.0, deadline - time.monotonic()),
        digests,
        seed.welcome.publication,
        values is not None,
        bytes.fromhex(trace),
    )
    if values is not None:
        seed.expect_values()
    meanwhile = None if values is None else values.read
    leased, frames = seed.conversation.request(request, messages.Leased, deadline, "lease", meanwhile)
    try:
        if len(frames) != 1 + leased.regions + leased.places + (leased.values or 0):
            raise ProtocolError(f"{seed.address}: a lease came with other pages than it announced")
        offer, *frames = frames
        region_pages, frames = frames[: leased.regions], frames[leased.regions :]
        place_pages, value_pages = frames[: leased.places], frames[leased.places :]
        remote = tables.unpack_regions(region_pages, seed.welcome.storages, seed.check)
        enter("open")
        channel = ForkChannel(seed.conversation, leased.lease, leased.share)
        host = seed.conversation.resolved.host
        with _explained(seed, leased.lease, deadline), _opening(transport):
            session = transport.open(offer, host, remote, regions, channel, deadline)
        try:
            theirs = tables.unpack_places(place_pages, seed.welcome.storages, seed.check)
            ours = {storage.id: place for storage, place in zip(storages, places, strict=True)}
            sizes = {region.id: region.nbytes for region in remote}
            yield Lease(
                leased.lease,
                leased.generation,
                session,
                sizes,
                theirs,
                ours,
                transport.piece if leased.share is None else transport.limited_piece(leased.share),
                scratch,
                leased.version,
                None if leased.values is None else SeedValues(value_pages, leased.salt, leased.beyond),
                leased.rate_limit,
            )
        finally:
            enter("close")
            soon = time.monotonic() + (CANCELLED_TIMEOUT if seed.cancelled else CLOSE_TIMEOUT)
            _close(session, min(deadline, soon), trace)
    finally:
        _release(seed, leased.lease, deadline, trace)


def get_ready(lease: Lease, transport: Transport, seed: SeedConnection, deadline: float) -> None:
    """Wait for what `Transport.open` began. Raises as `take_lease` does."""
    with _explained(seed, lease.id, deadline), _opening(transport):
        lease.session.ready(deadline)


@contextmanager
def _opening(transport: Transport) -> Iterator[None]:
    """Inside, what is not an error of ours becomes one."""
    try:
        yield
    except TensorForkError:
        raise
    except Exception as error:
        if found := exhausted(error):
            raise found from error
        raise TransportUnavailable(f"{transport.name} failed to open a session: {error!r}") from error


@contextmanager
def _explained(seed: SeedConnection, id: bytes, deadline: float) -> Iterator[None]:
    """Inside, a transport that cannot be opened raises what the seed says of the lease, if it has ended it;
    `PeerUnreachable` if the seed is gone; and says if other connections than ours reach other seeds.
    """
    try:
        yield
    except TransportUnavailable as error:
        try:
            seed.conversation.check_there("open")
        except PeerUnreachable as lost:
            raise lost from error
        soon = min(deadline, time.monotonic() + CLOSE_TIMEOUT)
        if not isinstance(error.__cause__, PeerUnreachable | TransferFailed) or time.monotonic() >= soon:
            raise
        try:
            seed.conversation.request(messages.CheckLease(id, False), messages.Checked, soon, "open")
        except (SeedChanged, SeedMoved, SeedAsleep) as explained:
            raise explained from error
        except TensorForkError:
            raise error from error.__cause__
        if why := seed.why_spread(soon):
            raise TransportUnavailable(f"{why} ({error})") from error
        raise


def _close(session: Session, deadline: float, trace: str) -> None:
    """Close a session. If that fails it is logged only: the bytes have come, or another error says why not."""
    try:
        session.close(deadline)
    except Exception:
        log.exception("a session was not closed (trace %s)", trace)


@contextmanager
def lease_of_nothing(seed: SeedConnection, deadline: float, trace: str) -> Iterator[messages.Leased]:
    """Take a lease over no transport, under which digests can be asked for; give it back at the end."""
    seconds = max(0.0, deadline - time.monotonic())
    publication, traced = seed.welcome.publication, bytes.fromhex(trace)
    request = messages.TakeLease(messages.NO_TRANSPORT, {}, seconds, True, publication, trace=traced)
    leased, _ = seed.conversation.request(request, messages.Leased, deadline, "lease")
    try:
        yield leased
    finally:
        _release(seed, leased.lease, deadline, trace)


def _release(seed: SeedConnection, id: bytes, deadline: float, trace: str) -> None:
    """Give a lease back. If that fails it is logged only: the seed ends the lease itself, when its time is over."""
    now, cancelled = time.monotonic(), seed.cancelled
    soon = now + CANCELLED_TIMEOUT if cancelled else min(max(deadline, now + 0.2), now + CLOSE_TIMEOUT)
    try:
        with seed.conversation.leaving():
            seed.conversation.request(messages.CheckLease(id, True), messages.Checked, soon, "release")
    except TensorForkError as error:
        log.info("lease %s was not given back (trace %s): %s", id.hex()[:8], trace, error)
