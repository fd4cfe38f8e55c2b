"""Moving the bytes: the plan for a lease, and the pull."""

from collections.abc import Callable
from threading import Event

from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import PeerUnreachable, ProtocolError, TransferFailed
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.cut import Plan, complete, cut
from tensorfork.fork.destination import Destination
from tensorfork.fork.lease import Lease
from tensorfork.fork.strided import pull_strided

Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived and the bytes there are, now and then, on the thread that called."""


def plan(held: Lease, target: Destination, peer: SeedConnection) -> Plan:
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
    target: Destination,
    peer: SeedConnection,
    deadline: float,
    progress: Progress | None,
    verification: ArrivalDigests | None,
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


def _bytes(plan: Plan) -> int:
    return sum(copy.nbytes for copy in plan.copies) + sum(pair.ours.nbytes for pair in plan.strided)
