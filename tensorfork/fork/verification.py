"""Whether what arrived is what the seed holds: its generation is compared, then the digests; and why it failed."""

import time
from collections.abc import Mapping

from tensorfork.digest import definition
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.digest.content import content_root
from tensorfork.errors import (
    ProtocolError,
    SeedAsleep,
    SeedChanged,
    SeedMoved,
    TensorForkError,
    TransferFailed,
    VerificationFailed,
)
from tensorfork.fork import wrong_pieces
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.lease import Lease
from tensorfork.fork.wrong_pieces import Wrong
from tensorfork.layout import ModelLayout
from tensorfork.wire import messages, tables

EXPLAIN_TIMEOUT = 2.0
"""Seconds that a failed transfer waits for the seed's word on it."""


def explain_failure(error: TransferFailed, lease: Lease, seed: SeedConnection, deadline: float) -> None:
    """Raise what the seed says about a transfer that failed: `SeedChanged`, `SeedMoved` or `SeedAsleep`, if it does.

    Says nothing where memory of ours may still be written to, which only the given error names.
    """
    soon = min(deadline, time.monotonic() + EXPLAIN_TIMEOUT)
    if error.undrained or time.monotonic() >= soon:
        return
    try:
        check_generation(lease, seed, soon)
    except (SeedChanged, SeedMoved, SeedAsleep) as explained:
        raise explained from error
    except TensorForkError:
        return  # it cannot say


def check_generation(lease: Lease, seed: SeedConnection, deadline: float) -> None:
    """Raise `SeedChanged` unless the seed is still at the lease's generation, and that is even.

    Raises `SeedMoved` if its tensors are not where they were, and `SeedAsleep` if it was suspended.
    """
    now, _ = seed.conversation.request(messages.CheckLease(lease.id, False), messages.Checked, deadline, "check")
    if lease.generation % 2 or now.generation != lease.generation:
        raise SeedChanged(
            f"{seed.address}: the seed's weights changed during the fork (generation {lease.generation}, then "
            f"{now.generation}); what arrived may be of two moments. Fork again, or allow restarts=."
        )


def compare_digests(
    lease: Lease,
    seed: SeedConnection,
    layout: ModelLayout,
    arrivals: ArrivalDigests,
    renamed: Mapping[str, str],
    deadline: float,
) -> str:
    """Compare the digest of every tensor with the seed's. `layout` is the seed's, whose order the digests have.

    `renamed` has the seed's names for those of ours that are called otherwise there. Returns the root over all the
    seed's digests, as hexadecimal digits. Raises `VerificationFailed` with the names, ours, of the tensors that differ,
    and where in them, and as `ask_for_digests` does.
    """
    check_definition(seed)
    pieces = arrivals.pieces()
    ours = definition.roots(pieces)
    expected = ask_for_digests(lease.id, lease.generation, seed, layout, deadline)
    names = [name for name, value in ours.items() if expected[renamed.get(name, name)] != value]
    if names:
        there = {name: renamed.get(name, name) for name in names}
        wrong = {name: Wrong(there[name], pieces[name], expected[there[name]]) for name in names}
        ranges = wrong_pieces.find(wrong, lease, seed, layout, min(deadline, time.monotonic() + EXPLAIN_TIMEOUT))
        shown = ", ".join(wrong_pieces.in_words(name, wrong[name], ranges) for name in names[:20])
        shown += f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise VerificationFailed(
            f"{seed.address}: {len(names)} of {len(ours)} tensors are not what the seed holds: {shown}. Do not use "
            "the model; fork again, and suspect the memory and the network between if it happens twice. A seed that "
            "changes its weights outside of seed.updating() does this too.",
            tensors=names,
            ranges=ranges,
        )
    return content_root(expected).hex()


def check_definition(seed: SeedConnection) -> None:
    """Raise `ProtocolError` where the seed computes other digests than we do."""
    if seed.welcome.digest != definition.NAME:
        raise ProtocolError(
            f"{seed.address}: the seed's digests are {seed.welcome.digest!r}, ours {definition.NAME!r}; use the same "
            "version of tensorfork, or fork with verify=False at your own risk"
        )


def ask_for_digests(
    lease: bytes, generation: int, seed: SeedConnection, layout: ModelLayout, deadline: float
) -> dict[str, int]:
    """The digests of all the seed's tensors, by its names, under a lease at a generation.

    Raises `SeedChanged` where that is over, and what the seed refuses with.
    """
    reply, frames = seed.conversation.request(messages.GetDigests(lease), messages.Digests, deadline, "digests")
    if reply.generation != generation:
        raise SeedChanged(f"{seed.address}: the seed's weights changed before their digests were computed; fork again")
    values = tables.unpack_digests(frames, len(layout.tensors))
    return dict(zip((tensor.name for tensor in layout.tensors), values, strict=True))
