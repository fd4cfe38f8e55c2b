"""The fork's side: from a greeting to verified bytes, one step a function. `api` strings them together."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event
from types import TracebackType
from typing import Self

from attrs import frozen

from tensorfork import digest, wire
from tensorfork.bootstrap import Conversation, ForkChannel
from tensorfork.errors import (
    IdentityMismatch,
    PeerUnreachable,
    ProtocolError,
    SeedChanged,
    TensorForkError,
    TransferFailed,
    TransportUnavailable,
    VerificationFailed,
)
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout
from tensorfork.plan import Plan, complete, cut
from tensorfork.strided import Scratch, pull_strided
from tensorfork.target import Room, Target
from tensorfork.transports import registry
from tensorfork.transports.base import Place, Region, Session, Transport
from tensorfork.verify import Verification
from tensorfork.version import __version__

log = logging.getLogger("tensorfork")

HELLO = 10.0
"""Seconds for the first answer, where the timeout is longer: nobody waits minutes for a host that is not there."""
Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived and the bytes there are, now and then, on the thread that called."""


class Peer:
    """A seed, as a fork sees it: the conversation with it, and what it said at its welcome."""

    def __init__(self, address: str, deadline: float) -> None:
        self.address = address
        self.conversation = Conversation(address, min(deadline, time.monotonic() + HELLO))
        self.welcome: wire.Welcome

    def greet(self, deadline: float) -> None:
        """Say hello."""
        hello = wire.Hello(__version__)
        soon = min(deadline, time.monotonic() + HELLO)
        self.welcome, _ = self.conversation.ask(hello, wire.Welcome, soon, "hello")

    def compare(self, identity: Identity | None, rank: Rank | None) -> list[str]:
        """Raise `IdentityMismatch` if it is not what we are; what was not compared, as it was not given."""
        seed, its_rank = wire.unpack_identity(self.welcome)
        differ: dict[str, tuple[object, object]] = {}
        if identity is not None:
            differ |= (seed or Identity()).differences(identity)
        if rank is not None:
            differ |= {"rank": (None, rank)} if its_rank is None else its_rank.differences(rank)
        if differ:
            raise IdentityMismatch(self.address, differ)
        return [what for what, given in (("identity", identity), ("rank", rank)) if given is None]

    def layout(self, deadline: float) -> ModelLayout:
        """Every tensor it has."""
        pages, frames = self.conversation.ask(wire.GetLayout(), wire.Pages, deadline, "layout")
        layout = wire.unpack_layout(pages, frames, self.welcome)
        if len(layout.tensors) != self.welcome.tensors or layout.nbytes != self.welcome.nbytes:
            raise ProtocolError(f"{self.address}: the layout is not the one that its welcome announced")
        return layout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.conversation.close()


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


def transports(wanted: str | Transport) -> list[Transport]:
    """What to try, in order."""
    if isinstance(wanted, Transport):
        return [wanted]
    if not isinstance(wanted, str):
        raise TypeError(f"transport must be a name or a Transport, not {type(wanted).__name__}")
    return [registry.load(name) for name in (registry.AUTO if wanted == "auto" else [wanted])]


def reason_against(transport: Transport, peer: Peer, regions: Sequence[Region]) -> str | None:
    """Why a transport cannot be used between us and the peer; None if nothing speaks against it."""
    offered = peer.welcome.transports.get(transport.name)
    if offered is None:
        return f"the seed does not offer it; it offers: {', '.join(peer.welcome.transports) or 'nothing'}"
    if offered.why_not is not None:
        return f"the seed cannot: {offered.why_not}"
    try:
        return transport.why_not(transport.facts(regions), offered.facts)
    except TransportUnavailable as error:
        return str(error)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # of a seed that says something else
        return f"what the seed says of it makes no sense: {error!r}"


@contextmanager
def lease(
    peer: Peer, transport: Transport, room: Room, deadline: float, *, digests: bool, enter: Callable[[str], object]
) -> Iterator[Lease]:
    """Take a lease over a transport, and open a session under it; give both back at the end. The session gets ready
    while the caller looks at what it holds, and draws up the plans.

    `enter` is told the phase that begins. Raises `TransportUnavailable` where this transport turns out not to work.
    """
    enter("lease")
    scratch = Scratch.for_tensors(room.gaps)
    given = [*room.regions, *scratch.regions]
    regions, places = transport.cover(given)
    request = wire.TakeLease(
        transport.name, dict(transport.facts(given)), max(0.0, deadline - time.monotonic()), digests
    )
    taken, frames = peer.conversation.ask(request, wire.Leased, deadline, "lease")
    try:
        remote = wire.unpack_regions(frames)
        enter("open")
        channel = ForkChannel(peer.conversation, taken.lease)
        host = peer.conversation.peer.host
        session = transport.open(taken.offer, host, remote, regions, channel, deadline)
        try:
            theirs = wire.unpack_places(frames)
            ours = {region.id: place for region, place in zip(given, places, strict=True)}
            sizes = {region.id: region.nbytes for region in remote}
            yield Lease(taken.lease, taken.generation, session, sizes, theirs, ours, transport.piece, scratch)
        finally:
            enter("close")
            session.close(deadline)
    finally:
        _release(peer, taken.lease, deadline)


def plan(held: Lease, target: Target, peer: Peer) -> Plan:
    """What to copy. Raises `ProtocolError` unless every tensor lies within a leased region: no transport is to read
    anything else.
    """
    for tensor in (pair.theirs for pair in target.pairs if pair.theirs.numel):
        place = held.theirs.get(tensor.storage)
        if place is None or place.offset + tensor.offset + tensor.extent > held.sizes.get(place.region, 0):
            raise ProtocolError(f"{peer.address}: {tensor.name} does not lie within what was leased")
    return cut(target.pairs, held.theirs, held.ours, held.piece)


def pull(
    held: Lease,
    plan: Plan,
    target: Target,
    peer: Peer,
    deadline: float,
    progress: Progress | None,
    verification: Verification | None,
) -> int:
    """Move every byte; how many they were. Raises `TransferFailed` with the names of the tensors that are complete."""
    total = _bytes(plan)
    arrived: list[int] = []
    moved = 0

    def done(i: int) -> None:
        nonlocal moved
        arrived.append(i)
        moved += plan.copies[i].nbytes
        if verification is not None:
            verification.arrived(i)
        if progress is not None:
            progress(moved, total)

    if progress is not None:
        progress(0, total)
    try:
        if plan.copies:
            held.session.pull(plan.copies, deadline, done, Event())
        if len(arrived) != len(plan.copies) or len(set(arrived)) != len(arrived):
            raise TransferFailed(f"the transport reported {len(arrived)} of {len(plan.copies)} copies")
        for pair in plan.strided:
            tensor = target.tensors[pair.name]
            pull_strided(held.session, pair, tensor, held.theirs, held.ours, held.scratch, deadline)
            moved += pair.ours.nbytes
            if progress is not None:
                progress(moved, total)
    except TransferFailed as error:
        strided = {pair.name for pair in plan.strided}
        whole = complete(
            [pair for pair in target.pairs if pair.name not in strided],
            held.ours,
            [plan.copies[i] for i in set(arrived)],
        )
        raise TransferFailed(
            f"{peer.address}: {error}; {len(whole)} of {len(target.pairs)} tensors had arrived. Try again, or another "
            "seed; do not use the model.",
            complete=whole,
            undrained=error.undrained,
        ) from error
    except PeerUnreachable as error:
        raise TransferFailed(f"{error}; do not use the model") from error
    return total


def check(held: Lease, peer: Peer, deadline: float) -> None:
    """Raise `SeedChanged` unless the seed is still at the lease's generation, and was not being changed."""
    now, _ = peer.conversation.ask(wire.CheckLease(held.id, False), wire.Checked, deadline, "check")
    if held.generation % 2 or now.generation != held.generation:
        raise SeedChanged(
            f"{peer.address}: the seed's weights changed during the fork (generation {held.generation}, then "
            f"{now.generation}); what arrived may be of two moments. Fork again, or allow restarts=."
        )


def verify(held: Lease, peer: Peer, layout: ModelLayout, verification: Verification, deadline: float) -> None:
    """Compare the digest of every tensor with the seed's; raises `VerificationFailed` naming those that differ."""
    if peer.welcome.digest != digest.NAME:
        raise ProtocolError(
            f"{peer.address}: the seed's digests are {peer.welcome.digest!r}, ours {digest.NAME!r}; use the same "
            "version of tensorfork, or verify=False at your own risk"
        )
    have = verification.digests()
    reply, frames = peer.conversation.ask(wire.GetDigests(held.id), wire.Digests, deadline, "digests")
    if reply.generation != held.generation:
        raise SeedChanged(f"{peer.address}: the seed's weights changed before their digests were computed; fork again")
    want = dict(zip((t.name for t in layout.tensors), wire.unpack_digests(frames, len(layout.tensors)), strict=True))
    wrong = [name for name, value in have.items() if want[name] != value]
    if wrong:
        shown = ", ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise VerificationFailed(
            f"{peer.address}: {len(wrong)} of {len(have)} tensors are not what the seed holds: {shown}. Do not use the "
            "model; fork again, and suspect the memory and the network between if it happens twice. A seed that "
            "changes its weights outside of seed.updating() does this too.",
            tensors=wrong,
        )


def _release(peer: Peer, id: bytes, deadline: float) -> None:
    """Give a lease back, best effort: it ends by itself too."""
    try:
        soon = min(max(deadline, time.monotonic() + 0.2), time.monotonic() + 2.0)
        peer.conversation.ask(wire.CheckLease(id, True), wire.Checked, soon, "release")
    except TensorForkError as error:
        log.info("a lease was not given back: %s", error)


def _bytes(plan: Plan) -> int:
    return sum(copy.nbytes for copy in plan.copies) + sum(pair.ours.nbytes for pair in plan.strided)
