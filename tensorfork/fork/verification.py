"""Is what arrived what the seed holds: its generation, then its digests."""

from tensorfork.digest import definition
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import ProtocolError, SeedChanged, VerificationFailed
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.lease import Lease
from tensorfork.layout import ModelLayout
from tensorfork.wire import messages, tables


def check_generation(held: Lease, peer: SeedConnection, deadline: float) -> None:
    """Raise `SeedChanged` unless the seed is still at the lease's generation, and was not being changed."""
    now, _ = peer.conversation.request(messages.CheckLease(held.id, False), messages.Checked, deadline, "check")
    if held.generation % 2 or now.generation != held.generation:
        raise SeedChanged(
            f"{peer.address}: the seed's weights changed during the fork (generation {held.generation}, then "
            f"{now.generation}); what arrived may be of two moments. Fork again, or allow restarts=."
        )


def compare_digests(
    held: Lease, peer: SeedConnection, layout: ModelLayout, verification: ArrivalDigests, deadline: float
) -> None:
    """Compare the digest of every tensor with the seed's; raises `VerificationFailed` naming those that differ."""
    if peer.welcome.digest != definition.NAME:
        raise ProtocolError(
            f"{peer.address}: the seed's digests are {peer.welcome.digest!r}, ours {definition.NAME!r}; use the same "
            "version of tensorfork, or verify=False at your own risk"
        )
    have = verification.digests()
    reply, frames = peer.conversation.request(messages.GetDigests(held.id), messages.Digests, deadline, "digests")
    if reply.generation != held.generation:
        raise SeedChanged(f"{peer.address}: the seed's weights changed before their digests were computed; fork again")
    want = dict(zip((t.name for t in layout.tensors), tables.unpack_digests(frames, len(layout.tensors)), strict=True))
    wrong = [name for name, value in have.items() if want[name] != value]
    if wrong:
        shown = ", ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise VerificationFailed(
            f"{peer.address}: {len(wrong)} of {len(have)} tensors are not what the seed holds: {shown}. Do not use the "
            "model; fork again, and suspect the memory and the network between if it happens twice. A seed that "
            "changes its weights outside of seed.updating() does this too.",
            tensors=wrong,
        )
