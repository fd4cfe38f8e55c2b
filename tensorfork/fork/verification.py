"""Whether what arrived is what the seed holds: its generation is compared, then the digests."""

from tensorfork.digest import definition
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import ProtocolError, SeedChanged, VerificationFailed
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.lease import Lease
from tensorfork.layout import ModelLayout
from tensorfork.wire import messages, tables


def check_generation(lease: Lease, seed: SeedConnection, deadline: float) -> None:
    """Raise `SeedChanged` unless the seed is still at the lease's generation, and that is even."""
    now, _ = seed.conversation.request(messages.CheckLease(lease.id, False), messages.Checked, deadline, "check")
    if lease.generation % 2 or now.generation != lease.generation:
        raise SeedChanged(
            f"{seed.address}: the seed's weights changed during the fork (generation {lease.generation}, then "
            f"{now.generation}); what arrived may be of two moments. Fork again, or allow restarts=."
        )


def compare_digests(
    lease: Lease, seed: SeedConnection, layout: ModelLayout, arrivals: ArrivalDigests, deadline: float
) -> None:
    """Compare the digest of every tensor with the seed's. `layout` is the seed's, whose order the digests have.

    Raises `VerificationFailed` with the names of the tensors that differ, `SeedChanged`, or `ProtocolError` where the
    seed computes other digests.
    """
    if seed.welcome.digest != definition.NAME:
        raise ProtocolError(
            f"{seed.address}: the seed's digests are {seed.welcome.digest!r}, ours {definition.NAME!r}; use the same "
            "version of tensorfork, or verify=False at your own risk"
        )
    ours = arrivals.digests()
    reply, frames = seed.conversation.request(messages.GetDigests(lease.id), messages.Digests, deadline, "digests")
    if reply.generation != lease.generation:
        raise SeedChanged(f"{seed.address}: the seed's weights changed before their digests were computed; fork again")
    theirs = tables.unpack_digests(frames, len(layout.tensors))
    expected = dict(zip((t.name for t in layout.tensors), theirs, strict=True))
    wrong = [name for name, value in ours.items() if expected[name] != value]
    if wrong:
        shown = ", ".join(wrong[:20]) + (f" and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise VerificationFailed(
            f"{seed.address}: {len(wrong)} of {len(ours)} tensors are not what the seed holds: {shown}. Do not use the "
            "model; fork again, and suspect the memory and the network between if it happens twice. A seed that "
            "changes its weights outside of seed.updating() does this too.",
            tensors=wrong,
        )
