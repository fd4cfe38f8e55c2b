"""Moving the bytes: what to copy under a lease, and the pull."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import ProtocolError, TensorForkError, TransferFailed, TransportUnavailable, UnsupportedTensor
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.cut import Plan, complete, cut
from tensorfork.fork.end_of_pull import EndOfPull
from tensorfork.fork.lease import Lease
from tensorfork.fork.pairs import Pair
from tensorfork.fork.strided import pull_strided
from tensorfork.fork.terms import Progress, Terms
from tensorfork.patience import looking
from tensorfork.regions import Place

EARLY = 0.1
"""Seconds before a fork's deadline from which on a failure may be of that: libraries count theirs in milliseconds."""


def make_plan(lease: Lease, pairs: Sequence[Pair], seed: SeedConnection) -> Plan:
    """What to copy. Raises `ProtocolError` unless every tensor of the seed's lies within a leased region.

    So no transport is ever asked to read anything else.
    """
    for tensor in (pair.theirs for pair in looking(pairs, seed.check) if pair.theirs.numel):
        place = lease.theirs.get(tensor.storage)
        if place is None or place.offset + tensor.offset + tensor.extent > lease.sizes.get(place.region, 0):
            raise ProtocolError(f"{seed.address}: {tensor.name} does not lie within what was leased")
    return cut(pairs, lease.theirs, lease.ours, lease.piece, seed.check)


def pull(
    lease: Lease,
    plan: Plan,
    pairs: Sequence[Pair],
    tensors: Callable[[], Mapping[str, torch.Tensor]],
    seed: SeedConnection,
    terms: Terms,
    digests: ArrivalDigests | None,
) -> int:
    """Move every byte of the plan, which fills `pairs`; return how many. `digests` is told of each copy that arrived.

    `tensors` gives those that are filled; it may wait until they are made.

    Ends early, too, when the seed's connection is lost. Whatever the transport raises becomes `TransferFailed`, with
    the names of the tensors that are complete; the others hold old and new bytes. But `TransportUnavailable` stays,
    since another transport may do, and what `progress` raises reaches the caller.
    """
    arrivals, end = _Arrivals(plan, terms.progress, digests), EndOfPull(terms.cancel, seed.conversation)
    try:
        arrivals.begin()
        if plan.copies:
            if not plan.strided:
                lease.session.expect_last_pull()
            lease.session.pull(plan.copies, terms.deadline, arrivals.add_copy, end)
        arrivals.check_copies()
        for pair in plan.strided:
            tensor, deadline = tensors()[pair.name], terms.deadline
            pull_strided(lease.session, pair, tensor, lease.theirs, lease.ours, lease.scratch, deadline, end)
            arrivals.add_strided(pair)
    except Exception as error:
        if error is arrivals.callback_error:
            raise CallbackRaised(error) from error
        if isinstance(error, TransportUnavailable | UnsupportedTensor):  # the latter from `tensors`
            raise
        arrived = arrivals.complete_tensors(pairs, lease.ours)
        why = str(error) if isinstance(error, TensorForkError) else f"the transport failed: {error!r}"
        why = str(end.lost) if end.lost is not None else why + _of_limit(lease, arrivals.total, terms)
        raise TransferFailed(
            f"{why if why.startswith(seed.address) else f'{seed.address}: {why}'}; {len(arrived)} of "
            f"{len(pairs)} tensors had arrived. Try again, or another seed; do not use the model.",
            complete=arrived,
            undrained=getattr(error, "undrained", ()),
        ) from error
    return arrivals.total


def _of_limit(lease: Lease, nbytes: int, terms: Terms) -> str:
    """What the seed's rate limit has to do with a deadline that was missed."""
    if lease.rate_limit is None or time.monotonic() < terms.deadline - EARLY:
        return ""
    return (
        f" (the seed has a rate limit, publish(rate_limit=), of {lease.rate_limit:,.0f} bytes a second for all its "
        f"forks together: for {nbytes:,} bytes it takes {nbytes / lease.rate_limit:,.1f} s or more, and timeout= was "
        f"{terms.timeout:g} s)"
    )


class CallbackRaised(Exception):
    """The caller's `progress` raised `error`, which may be one of ours and says nothing of the seed or a transport."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Arrivals:
    """What has arrived of a plan, as it is reported. `callback_error` is what `progress` raised."""

    def __init__(self, plan: Plan, progress: Progress | None, digests: ArrivalDigests | None) -> None:
        self._plan, self._progress, self._digests = plan, progress, digests
        self._copies: list[int] = []
        self._nbytes = 0
        self.callback_error: BaseException | None = None
        self.total = sum(copy.nbytes for copy in plan.copies) + sum(pair.ours.nbytes for pair in plan.strided)

    def begin(self) -> None:
        """Nothing has arrived yet."""
        self._add(0)

    def add_copy(self, i: int) -> None:
        """The plan's copy i has arrived."""
        self._copies.append(i)
        if self._digests is not None:
            self._digests.arrived(i)
        self._add(self._plan.copies[i].nbytes)

    def add_strided(self, pair: Pair) -> None:
        """One of the plan's strided tensors has arrived."""
        self._add(pair.ours.nbytes)

    def check_copies(self) -> None:
        """Raise `TransferFailed` unless every copy was reported exactly once."""
        if len(self._copies) != len(self._plan.copies) or len(set(self._copies)) != len(self._copies):
            raise TransferFailed(f"the transport reported {len(self._copies)} of {len(self._plan.copies)} copies")

    def complete_tensors(self, pairs: Sequence[Pair], ours: Mapping[int, Place]) -> list[str]:
        """The names of the tensors whose every byte has arrived. Strided ones are never among them."""
        strided = {pair.name for pair in self._plan.strided}
        copies = [self._plan.copies[i] for i in set(self._copies)]
        return complete([pair for pair in pairs if pair.name not in strided], ours, copies)

    def _add(self, nbytes: int) -> None:
        self._nbytes += nbytes
        if self._progress is not None:
            try:
                self._progress(self._nbytes, self.total)
            except BaseException as error:
                self.callback_error = error
                raise
