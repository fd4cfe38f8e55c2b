"""The steps of one fork, from hello to installation. `tensorfork.fork_into` and `tensorfork.fork` are both `run`.

    connect ─ hello ─ compare ─ layout ─ match ─ allocate ─┐
       ┌───────────────────────────────────────────────────┘
       └▶ for each transport that can work: lease ─ open ─ pull ─ check ─ verify     (again, after SeedChanged)
                                                                            └▶ install

A failure before `pull` leaves the model untouched. From then on tensors that had memory may hold some of the seed's
bytes; meta tensors stay meta until `install`, which gives memory to all of them or to none.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache

from attrs import evolve, frozen

from tensorfork.digest import warm_up
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import SeedChanged, TransportUnavailable
from tensorfork.fork import transfer, verification
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.destination import Destination, DestinationMemory
from tensorfork.fork.lease import take_lease
from tensorfork.fork.transport_choice import reason_against, transports_to_try
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout
from tensorfork.model.selection import Selection
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.transports.base import Transport


@frozen(eq=False, repr=False)
class Terms:
    """The arguments of a fork that its steps need; `tensorfork.fork_into` describes each."""

    transport: str | Transport
    deadline: float
    verify: bool
    restarts: int
    progress: transfer.Progress | None
    identity: Identity | None
    rank: Rank | None
    selection: Selection


@frozen(eq=False, repr=False)
class Filling:
    """How the destination is made, in two steps.

    Attributes:
        allocate: memory for the seed's tensors. It is told the layout, and calls its second argument with the phase
            that begins.
        tensors: the tensors in that memory; made while the transport opens.
    """

    allocate: Callable[[ModelLayout, Callable[[str], object]], DestinationMemory]
    tensors: Callable[[DestinationMemory], Destination]


def run(peer: str, filling: Filling, terms: Terms, watch: Stopwatch) -> tuple[ForkReport, Destination]:
    """Fork from the seed at `peer`: every step, in order.

    Raises:
        TensorForkError: docs/errors.md has each kind, and the state it leaves.
        ValueError: `peer` or the device cannot be used.
    """
    candidates = transports_to_try(terms.transport)
    watch.enter("resolve")
    with SeedConnection(peer, terms.deadline) as seed:
        watch.enter("hello")
        seed.greet(terms.deadline)
        not_compared = seed.compare(terms.identity, terms.rank)
        watch.enter("layout")
        layout = seed.layout(terms.deadline)
        selected, left_out = layout.only(terms.selection.selects)
        memory = filling.allocate(selected, watch.enter)
        if terms.verify:
            warm_up.begin(memory.devices)
        attempt = _Attempt(seed, layout, memory, cache(lambda: filling.tensors(memory)), terms, watch)
        report = _with_restarts(lambda: attempt.first_that_works(candidates), terms)
    watch.enter("install")
    destination = attempt.destination()
    destination.install()
    return evolve(
        report,
        seconds=dict(watch.stop()),
        not_compared=(*not_compared, *([] if terms.verify else ["digests"])),
        left_out=tuple(left_out),
        left_out_by_seed=layout.left_out,
    ), destination


def _with_restarts(attempt: Callable[[], ForkReport], terms: Terms) -> ForkReport:
    """Call `attempt` again after `SeedChanged`, as often as the caller allows, with pauses: a change takes a while."""
    for restarts in range(terms.restarts + 1):
        try:
            return evolve(attempt(), restarts=restarts)
        except SeedChanged:
            if restarts == terms.restarts:
                raise
            pause = 0.01 * 2 ** min(restarts, 5)
            time.sleep(max(0.0, min(pause, terms.deadline - time.monotonic())))
    raise AssertionError("restarts is negative")


@frozen(eq=False, repr=False)
class _Attempt:
    """An attempt to copy everything, at one generation of the seed."""

    seed: SeedConnection
    layout: ModelLayout
    memory: DestinationMemory
    destination: Callable[[], Destination]
    terms: Terms
    watch: Stopwatch

    def first_that_works(self, candidates: Sequence[Transport]) -> ForkReport:
        """Copy over the first transport that works between the two processes.

        Raises `TransportUnavailable`, with the reason against each, where none works.
        """
        passed_over: dict[str, str] = {}
        for transport in candidates:
            why_not = reason_against(transport, self.seed, self.memory.regions)
            if why_not is None:
                try:
                    return evolve(self._copy(transport), passed_over=passed_over)
                except TransportUnavailable as error:
                    why_not = str(error)
            passed_over[transport.name] = why_not
        reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
        raise TransportUnavailable(
            f"{self.seed.address}: no transport works between the seed and this process: {reasons}"
        )

    def _copy(self, transport: Transport) -> ForkReport:
        """Lease, open, pull, check, verify. Raises `TransportUnavailable` where the transport turns out not to work."""
        terms, seed, enter = self.terms, self.seed, self.watch.enter
        deadline = terms.deadline
        with take_lease(seed, transport, self.memory, deadline, digests=terms.verify, enter=enter) as lease:
            enter("allocate")
            destination = self.destination()
            enter("match")
            plan = transfer.make_plan(lease, destination, seed)
            enter("verify")
            digests = None
            if terms.verify:
                digests = ArrivalDigests(destination.tensors, destination.layouts, lease.ours, plan.copies)
            try:
                enter("open")
                lease.session.ready(deadline)
                enter("transfer")
                nbytes = transfer.pull(lease, plan, destination, seed, deadline, terms.progress, digests)
                enter("verify")
                verification.check_generation(lease, seed, deadline)
                if digests is not None:
                    verification.compare_digests(lease, seed, self.layout, digests, deadline)
            finally:
                destination.mark_changed()  # also where only some of it arrived
                if digests is not None:
                    digests.close()
        return ForkReport(
            peer=seed.address,
            transport=transport.name,
            fabric=lease.session.fabric,
            tensors=len(destination.tensors),
            nbytes=nbytes,
            generation=lease.generation,
            seconds={},
            verified=terms.verify,
        )
