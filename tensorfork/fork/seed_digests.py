"""The digests of a seed's tensors, without a fork."""

from threading import Event

from attrs import evolve

from tensorfork.digest.record import Digests
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.lease import lease_of_nothing
from tensorfork.fork.trace import trace_id, traced
from tensorfork.fork.verification import ask_for_digests, check_definition
from tensorfork.identity import Identity, Rank
from tensorfork.interpreter import ending
from tensorfork.model.selection import Selection
from tensorfork.wire import tables


def seed_digests(
    peer: str, deadline: float, stall: float, identity: Identity | None, rank: Rank | None, selection: Selection
) -> Digests:
    """Ask the seed at `peer`: hello, compare, layout, lease, digests. The lease is over no transport.

    Raises `TensorForkError` as a fork does, and `ValueError` where the selection includes what the seed does not have.
    """
    cancel, trace = Event(), trace_id(None)
    with (
        traced(trace, "a request for digests", peer),
        ending.guarded(cancel.set),
        SeedConnection(peer, deadline, cancel, stall=stall) as seed,
    ):
        seed.greet(deadline)
        seed.compare(identity, rank)
        check_definition(seed)
        layout = seed.layout(deadline)
        if unused := selection.unmatched([tensor.name for tensor in layout.tensors]):
            raise ValueError(f"include={unused[0]!r} means no tensor of the seed")
        with lease_of_nothing(seed, deadline, trace) as lease:
            found = ask_for_digests(lease.lease, lease.generation, seed, layout, deadline)
    digests = Digests.of(found, tables.unpack_version(lease.version), lease.generation)
    version = None if digests.version is None else evolve(digests.version, content=digests.content)
    return evolve(digests, version=version).only(selection.selects)
