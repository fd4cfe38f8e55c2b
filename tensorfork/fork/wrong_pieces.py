"""Where the tensors differ that did not verify: the seed is asked for the digests of their pieces."""

from collections.abc import Mapping, Sequence

from attrs import frozen

from tensorfork.digest.definition import Pieces, differing, root
from tensorfork.digest.elements import bytes_read_once
from tensorfork.errors import PeerRefused, PeerUnreachable, ProtocolError, Ranges, SeedChanged, SeedMoved
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.lease import Lease
from tensorfork.layout import ModelLayout
from tensorfork.wire import messages, tables

_SHOWN = 3
"""Ranges of a tensor that are put into words."""


@frozen
class Wrong:
    """A tensor whose digest is not the seed's."""

    there: str
    """Its name in the seed."""
    pieces: Pieces
    """The digests of our pieces of it."""
    expected: int
    """The seed's digest of it."""


def find(
    wrong: Mapping[str, Wrong], lease: Lease, seed: SeedConnection, layout: ModelLayout, deadline: float
) -> Ranges:
    """The ranges of bytes in which these tensors, by our names, differ, as (begin, end).

    Leaves out tensors of several pieces where the seed does not say by the deadline which ones differ, and what is
    beyond `MAX_PIECES_OF` of them. `layout` is the seed's.

    Raises `ProtocolError` where the seed's pieces do not make the digest that it gave, and `ForkCancelled`.
    """
    places = {tensor.name: i for i, tensor in enumerate(layout.tensors)}
    several = sorted({places[one.there] for one in wrong.values() if len(one.pieces) > 1})
    theirs = _ask(several[: messages.MAX_PIECES_OF], lease, seed, deadline)
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for name, one in wrong.items():
        place = places[one.there]
        nbytes = bytes_read_once(layout.tensors[place])
        if len(one.pieces) < 2:
            ranges[name] = ((0, nbytes),)
        elif place in theirs:
            found = tables.unpack_digests([theirs[place]], len(one.pieces))
            if root(found) != one.expected:
                raise ProtocolError(
                    f"{seed.address}: the seed's digests of the pieces of {one.there} are not those that its digest of "
                    f"the whole was made of. {name} is not what the seed holds either: do not use the model"
                )
            ranges[name] = tuple(differing(one.pieces, found, nbytes))
    return ranges


def in_words(name: str, one: Wrong, ranges: Ranges) -> str:
    """The tensor's name, and which bytes of it differ, if it has several pieces and that is known."""
    if len(one.pieces) < 2 or name not in ranges:
        return name
    found = ranges[name]
    shown = ", ".join(f"{begin:,} to {end:,}" for begin, end in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN:,} more ranges" if len(found) > _SHOWN else ""
    return f"{name} (bytes {shown}{more})"


def _ask(tensors: Sequence[int], lease: Lease, seed: SeedConnection, deadline: float) -> dict[int, bytes]:
    """The packed digests of these tensors' pieces, by the tensor; nothing where the seed cannot say."""
    if not tensors:
        return {}
    request = messages.GetPieces(lease.id, list(tensors))
    try:
        reply, frames = seed.conversation.request(request, messages.Pieces, deadline, "pieces")
    except (PeerUnreachable, PeerRefused, SeedChanged, SeedMoved):
        return {}
    if len(frames) != len(tensors):
        raise ProtocolError(f"{seed.address}: the pieces of {len(frames)} tensors came, {len(tensors)} were asked for")
    return dict(zip(tensors, frames, strict=True)) if reply.generation == lease.generation else {}
