"""The steps of one fork, from hello to installation. `tensorfork.fork_into` and `tensorfork.fork` are both `run`.

    connect ─▶ hello ─ compare ─ layout ─ match ─ allocate ─┐      (again, where the seed has published something else)
       ┌────────────────────────────────────────────────────┘
       └▶ for each transport that can work: lease ─ open ─ pull ─ check ─ verify     (again, after SeedChanged)
                                                                            └▶ install

A failure before `pull` leaves the model untouched. From then on tensors that had memory may hold some of the seed's
bytes; meta tensors stay meta until `install`, which gives memory to all of them or to none.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from threading import Event

import torch
from attrs import define, evolve, field, frozen

from tensorfork.digest import warm_up
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.errors import (
    ForkCancelled,
    PeerRefused,
    PeerUnreachable,
    ResourceExhausted,
    SeedAsleep,
    SeedChanged,
    TensorForkError,
    TransferFailed,
    TransportUnavailable,
)
from tensorfork.exhaustion import exhausted
from tensorfork.fork import transfer, verification
from tensorfork.fork.background import BackgroundCall
from tensorfork.fork.connection import SeedConnection
from tensorfork.fork.cut import Plan
from tensorfork.fork.destination import Destination, DestinationMemory
from tensorfork.fork.lease import Lease, get_ready, take_lease
from tensorfork.fork.seed_names import SeedNames
from tensorfork.fork.terms import Terms
from tensorfork.fork.trace import traced
from tensorfork.fork.transport_choice import reason_against
from tensorfork.fork.values import OurValues, log_differences
from tensorfork.interpreter import ending
from tensorfork.layout import ModelLayout
from tensorfork.lineage import Version
from tensorfork.patience import Check
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.transports.base import Transport
from tensorfork.wire import tables

log = logging.getLogger("tensorfork")

SLEEP_POLL = 0.01, 0.5
"""Seconds between two questions whether a seed is still suspended or changing: at first, and at most."""


@frozen(eq=False, repr=False)
class Filling:
    """How the destination is made, in two steps.

    Attributes:
        allocate: memory for the seed's tensors. It is told the layout, calls its second argument with the phase that
            begins, and its third every so often in loops over the layout.
        tensors: the tensors in that memory. It calls its second argument every so often.
        names: what they are called in the seed.
        values: our plain values; None where we have none.
    """

    allocate: Callable[[ModelLayout, Callable[[str], object], Check], DestinationMemory]
    tensors: Callable[[DestinationMemory, Check], Destination]
    names: SeedNames
    values: OurValues | None = None


def run(peer: str, filling: Filling, terms: Terms, watch: Stopwatch) -> tuple[ForkReport, Destination]:
    """Fork from the seed at `peer`: every step, in order.

    Raises:
        TensorForkError: docs/errors.md has each kind, and the state it leaves.
        ValueError: `peer` or the device cannot be used.
    """
    with traced(terms.trace, "a fork", peer):
        report, destination = _run(peer, filling, terms, watch)
    log.info("%s (trace %s)", report, terms.trace)
    return report, destination


def _run(peer: str, filling: Filling, terms: Terms, watch: Stopwatch) -> tuple[ForkReport, Destination]:
    deadline, wait_until = terms.deadline, terms.wait_until
    connect = partial(SeedConnection, peer, deadline, terms.cancel, wait_until, watch.enter, stall=terms.stall)
    with ending.guarded(terms.cancel.set), _cancellable(peer, terms.cancel), connect() as seed:
        attempts = _Attempts(seed, filling, terms, watch)
        try:
            report = _with_restarts(attempts.next, terms)
        except transfer.CallbackRaised as raised:
            raise raised.error from raised.error.__cause__
    watch.enter("install")
    attempt = attempts.last
    assert attempt is not None
    destination = attempt.destination()
    compared = None if attempt.values is None else attempt.values.compared
    destination.install(() if compared is None else compared.writes)
    if compared is not None:
        log_differences(compared.report, peer)
    skipped = [("digests", not terms.verify), ("values", attempt.values is not None and compared is None)]
    return evolve(
        report,
        seconds=dict(watch.stop()),
        not_compared=(*attempts.not_compared, *(check for check, is_skipped in skipped if is_skipped)),
        values=None if compared is None else compared.report,
        left_out=attempts.left_out,
        left_out_by_seed=attempt.layout.left_out,
    ), destination


@contextmanager
def _cancellable(peer: str, cancel: Event) -> Iterator[None]:
    """Inside, what fails once the fork is cancelled raises `ForkCancelled`: whatever stopped then stopped for that."""
    try:
        yield
    except TensorForkError as error:
        if not cancel.is_set() or isinstance(error, ForkCancelled):
            raise
        complete, undrained = getattr(error, "complete", ()), getattr(error, "undrained", ())
        raise ForkCancelled(
            f"{peer}: the fork was cancelled ({error})", complete=complete, undrained=undrained
        ) from error


def _with_restarts(attempt: Callable[[], ForkReport], terms: Terms) -> ForkReport:
    """Call `attempt` again after `SeedChanged`, as often as the caller allows, and after `SeedAsleep` for as long.

    Pauses in between: a change takes a while. At the deadline the last of these errors is raised, also where the peer
    gave no answer any more, or a transport could not be opened by then: for want of time, which the change took.
    """
    restarts = asleep = 0
    wait_until = terms.deadline if terms.restarts else terms.wait_until
    last: SeedChanged | SeedAsleep | None = None
    while True:
        try:
            return evolve(attempt(), restarts=restarts)
        except SeedAsleep as error:
            last, until, asleep = error, wait_until, asleep + 1
        except SeedChanged as error:
            if restarts == terms.restarts:
                raise
            last, until, restarts = error, terms.deadline, restarts + 1
        except (PeerUnreachable, PeerRefused, TransportUnavailable) as error:
            if last is None or time.monotonic() < terms.deadline:
                raise
            last.add_note(f"The fork waited for that until its timeout of {terms.timeout:g} s")
            raise last from error
        first, longest = SLEEP_POLL
        pause = min(longest, first * 2 ** min(restarts + asleep, 10))
        if time.monotonic() + pause >= until:
            last.add_note(f"The fork waited for that as long as it may, within its timeout of {terms.timeout:g} s")
            raise last
        if terms.cancel.wait(pause):
            raise last


@define(eq=False, repr=False)
class _Attempts:
    """The attempts of one fork. What was matched and allocated is used again while the seed publishes the same."""

    seed: SeedConnection
    filling: Filling
    terms: Terms
    watch: Stopwatch
    last: "_Attempt | None" = None
    not_compared: Sequence[str] = ()
    left_out: Sequence[str] = ()
    _publication: int = field(default=-1, init=False)

    def next(self) -> ForkReport:
        """One attempt, at what the seed has published now."""
        seed, terms = self.seed, self.terms
        self.watch.enter("hello")
        seed.greet(terms.deadline)
        self.not_compared = seed.compare(terms.identity, terms.rank)
        seed.check_version(terms.version, terms.at_least)
        if self.last is None or self._publication != seed.welcome.publication:
            self.last = None  # before new memory is allocated
            self.last = self._prepare()
            self._publication = seed.welcome.publication
        return self.last.first_that_works(terms.transports)

    def _prepare(self) -> "_Attempt":
        terms, filling = self.terms, self.filling
        self.watch.enter("layout")
        layout = self.seed.layout(terms.deadline)
        selected, left_out = layout.only(filling.names.selects, self.seed.check)
        self.left_out = tuple(map(filling.names.ours, left_out))
        memory = filling.allocate(selected, self.watch.enter, self.seed.check)
        if terms.verify:
            warm_up.begin(memory.devices)
        destination = cache(lambda: filling.tensors(memory, self.seed.check))
        return _Attempt(self.seed, layout, memory, destination, filling.names, filling.values, terms, self.watch)


@frozen(eq=False, repr=False)
class _Attempt:
    """An attempt to copy everything, at one generation of the seed."""

    seed: SeedConnection
    layout: ModelLayout
    memory: DestinationMemory
    destination: Callable[[], Destination]
    names: SeedNames
    values: OurValues | None
    terms: Terms
    watch: Stopwatch

    def first_that_works(self, candidates: Sequence[Transport]) -> ForkReport:
        """Copy over the first transport that works between the two processes.

        Raises `TransportUnavailable`, with the reason against each, where none works; or `ResourceExhausted`, if one of
        them would have worked with more of that.
        """
        passed_over: dict[str, str] = {}
        wanting: ResourceExhausted | None = None
        for transport in candidates:
            why_not = reason_against(transport, self.seed, self.memory.regions)
            if why_not is None:
                try:
                    return evolve(self._copy(transport), passed_over=passed_over)
                except (TransportUnavailable, ResourceExhausted) as error:
                    why_not, wanting = str(error), wanting or exhausted(error)
            passed_over[transport.name] = why_not
        reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
        text = f"{self.seed.address}: no transport works between the seed and this process: {reasons}"
        if wanting is not None:
            raise ResourceExhausted(text, resource=wanting.resource) from wanting
        raise TransportUnavailable(text)

    def _copy(self, transport: Transport) -> ForkReport:
        """Lease, open, pull, check, verify. Raises `TransportUnavailable` where the transport turns out not to work."""
        terms, seed, enter = self.terms, self.seed, self.watch.enter
        deadline = terms.deadline
        asked, values = terms.verify, self.values if self.values and self.values.policy.compares else None
        with (
            take_lease(
                seed, transport, self.memory, deadline, digests=asked, values=values, trace=terms.trace, enter=enter
            ) as lease,
            self._comparing(lease),
            self._tensors() as tensors,
            seed.conversation.watched("transfer"),
        ):
            version = seed.check_version(terms.version, terms.at_least, lease.version)
            enter("match")
            plan = transfer.make_plan(lease, self.memory.filled, seed)
            enter("open")
            get_ready(lease, transport, seed, deadline)
            enter("transfer")
            with self._arrivals(lease, plan, tensors) as digests:
                try:
                    nbytes = transfer.pull(lease, plan, self.memory.filled, tensors, seed, terms, digests)
                    with self._all_here():
                        version = self._check(lease, digests, version)
                except TransferFailed as error:
                    verification.explain_failure(error, lease, seed, deadline)
                    raise
                finally:
                    if not self.memory.tensors_can_wait:
                        self.destination().mark_changed()  # also where only some of it arrived
        return ForkReport(
            peer=seed.address,
            transport=transport.name,
            fabric=lease.session.fabric,
            tensors=len(self.memory.pairs),
            nbytes=nbytes,
            generation=lease.generation,
            seconds={},
            verified=terms.verify,
            version=version,
            trace=terms.trace,
            rate_limit=lease.rate_limit,
        )

    @contextmanager
    def _all_here(self) -> Iterator[None]:
        """Inside, all bytes have arrived, and `ForkCancelled` says so."""
        try:
            yield
        except ForkCancelled as error:
            raise ForkCancelled(str(error), complete=[pair.name for pair in self.memory.pairs]) from error

    def _check(self, lease: Lease, digests: ArrivalDigests | None, version: Version) -> Version:
        """Check what has arrived; return the version, with its content where digests were compared."""
        terms, seed, deadline = self.terms, self.seed, self.terms.deadline
        self.watch.enter("verify")
        verification.check_generation(lease, seed, deadline)
        if digests is not None:
            content = verification.compare_digests(lease, seed, self.layout, digests, self.names.renamed, deadline)
            version = evolve(version, content=content)
            seed.check_version(terms.version, terms.at_least, tables.pack_version(version))
        seed.conversation.check_cancelled("install")  # the last look: what begins now is done
        return version

    def _comparing(self, lease: Lease) -> AbstractContextManager[None]:
        """Compare the seed's values with ours. Raises `ValueMismatch` before the block is entered."""
        return nullcontext() if self.values is None else self.values.comparing(lease.values, self.seed.address)

    @contextmanager
    def _tensors(self) -> Iterator[Callable[[], Mapping[str, torch.Tensor]]]:
        """The tensors to fill: made while handles open and bytes move, where no failure would show in the model."""
        if self.memory.tensors_can_wait:
            making = BackgroundCall(self.destination, "tensorfork-tensors")
            try:
                yield lambda: making.result().tensors
                making.result()
            finally:
                making.wait()
            return
        tensors = self.destination().tensors
        yield lambda: tensors

    @contextmanager
    def _arrivals(
        self, lease: Lease, plan: Plan, tensors: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Iterator[ArrivalDigests | None]:
        """What computes our digests; None without verification."""
        if not self.terms.verify:
            yield None
            return
        layouts, devices = [pair.ours for pair in self.memory.filled], self.memory.devices
        cancel, deadline = self.terms.cancel, self.terms.deadline
        digests = ArrivalDigests(tensors, layouts, devices, lease.ours, plan.copies, cancel, deadline)
        try:
            yield digests
        finally:
            digests.close()
