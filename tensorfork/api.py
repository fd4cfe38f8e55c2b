"""The story: publish a model in one process, fork it in another."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from attrs import evolve, frozen

from tensorfork import forking, target
from tensorfork.collector import put_off_collections
from tensorfork.errors import SeedChanged, TensorForkError, TransportUnavailable, UnsupportedTensor
from tensorfork.forking import Peer, Progress
from tensorfork.identity import Identity, Rank
from tensorfork.layout import ModelLayout, survey
from tensorfork.plan import match
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.seed import Seed
from tensorfork.selection import Patterns, Selection
from tensorfork.target import Device, Room, Target
from tensorfork.transports import registry
from tensorfork.transports.base import Transport
from tensorfork.verify import Verification, warm_up

TIMEOUT = 300.0
"""Seconds a fork may take, unless told otherwise."""
UNCOLLECTED = 2.0
"""Seconds of a fork in which no garbage is collected: those that go over NVLink are over by then."""


def publish(
    model: Any,
    *,
    bind: str = "tcp://127.0.0.1:*",
    advertise: str | None = None,
    transports: Sequence[str | Transport] | None = None,
    identity: Identity | None = None,
    rank: Rank | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Seed:
    """Let other processes fork this model, from now until the seed is closed.

    Nothing is copied, and nothing waits for a fork: the tensors are described, the current stream of each of their GPUs
    is synchronised once, and a thread begins to answer. Change the tensors in place only under `Seed.updating`. A seed
    that nobody closes is closed when the process ends.

    Args:
        model: an `nn.Module`, of which every tensor is published (docs/reliability.md says where they are found); or a
            mapping of names to tensors, of which just those are.
        bind: the address to listen on. Whoever reaches it can read the model: it is loopback unless told otherwise.
        advertise: the host, or host:port, by which forks reach it; needed with ``tcp://0.0.0.0:*``.
        transports: names or instances to offer; all that work here, by default.
        identity: which model this is; compared by forks that say theirs.
        rank: which part of the model this process holds; compared by forks that say theirs.
        include: names of tensors, or patterns with ``*`` and ``?``, each for what lies under it too; only these are
            published.
        exclude: the same for those that are not: caches, and integers that hold addresses or handles.

    Raises:
        TypeError: it is not a model.
        ValueError: `include` names what the model does not have.
        UnsupportedTensor: one of its tensors cannot be forked; the message names it.
        TransportUnavailable: one of the transports named cannot work here.
        OSError: the address cannot be listened on.
    """
    with put_off_collections():
        ours = survey(model, Selection(include, exclude), identity, rank)
        if lost := [name for name, tensor in ours.tensors.items() if tensor.is_meta]:
            raise UnsupportedTensor(f"{lost[0]} is on the meta device and has no bytes to fork; load the model first")
        gpus = {tensor.device for tensor in ours.tensors.values() if tensor.is_cuda}
    for device in gpus:
        torch.cuda.current_stream(device).synchronize()
    warm_up(gpus)
    offered = _offered(transports)
    with put_off_collections():
        return Seed(ours.layout, ours.tensors, ours.memory, offered, bind, advertise)


def fork_into(
    model: Any,
    peer: str,
    *,
    device: Device = None,
    transport: str | Transport = "auto",
    timeout: float = TIMEOUT,
    verify: bool = True,
    restarts: int = 0,
    progress: Progress | None = None,
    identity: Identity | None = None,
    rank: Rank | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> ForkReport:
    """Fill the model's tensors with those of the seed at `peer`, in place: same objects, same storages, same ties.

    Tensors on the meta device get memory on `device`, in one allocation for each device and sharing storages as the
    seed's do, once everything has been verified; until then, and after any failure, they stay meta. For the first two
    seconds the process collects no garbage.

    A model that is published itself is to be filled under its seed's `Seed.updating`, as with all that changes it:
    forks of it would see two moments otherwise.

    Args:
        model: an `nn.Module` or a mapping of names to tensors, with the seed's names, dtypes, shapes and strides: built
            by the same code, and at the same moment of its life as the seed's was when it was published.
        peer: the seed's address, as `Seed.address` says it.
        device: where meta tensors go; as in the seed, by default (one GPU: to the current one).
        transport: "auto", a name, or a `Transport`.
        timeout: seconds for everything.
        verify: compare the digest of every tensor with the seed's.
        restarts: how often to begin again when the seed's weights change under the fork.
        progress: called with the bytes that have arrived, and the bytes there are.
        identity: which model this is; the seed's must be equal, and is compared before anything else.
        rank: which part of the model this process holds; the seed's must be equal but for data parallelism.
        include: names of tensors, or patterns with ``*`` and ``?``, each for what lies under it too; only these are
            filled, whatever else the seed has.
        exclude: the same for those that are left as they are. What the seed excludes is to be excluded here too.

    Raises:
        TensorForkError: see docs/errors.md for each kind, and for the state it leaves the model in.
        TypeError, ValueError: bad arguments, or another fork into the model is under way; nothing was touched.
    """
    deadline = time.monotonic() + timeout
    terms = _Terms(transport, deadline, verify, restarts, progress, identity, rank, Selection(include, exclude))
    with put_off_collections(UNCOLLECTED):
        watch = Stopwatch()
        watch.enter("survey")
        ours = survey(model, terms.selection)
        if verify:
            warm_up({tensor.device for tensor in ours.tensors.values()} | target.given(device))

        def room(theirs: ModelLayout, enter: Callable[[str], object]) -> Room:
            enter("match")
            pairs = match(theirs, ours.layout)
            enter("allocate")
            return target.room_for(pairs, theirs, ours, device)

        with target.alone(ours):
            report, _ = _fork(peer, _Into(room, lambda room: target.prepare(ours, room)), terms, watch)
        return evolve(report, left_out=tuple(dict.fromkeys([*ours.layout.left_out, *report.left_out])))


def fork(
    peer: str,
    *,
    device: Device = None,
    transport: str | Transport = "auto",
    timeout: float = TIMEOUT,
    verify: bool = True,
    restarts: int = 0,
    progress: Progress | None = None,
    identity: Identity | None = None,
    rank: Rank | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, torch.Tensor]:
    """All tensors of the seed at `peer`, by name, in new memory on `device`; ties are one tensor under several names.

    The arguments and errors are those of `fork_into`. After a failure there is nothing.
    """
    deadline = time.monotonic() + timeout
    terms = _Terms(transport, deadline, verify, restarts, progress, identity, rank, Selection(include, exclude))
    if verify:
        warm_up(target.given(device))

    def room(theirs: ModelLayout, enter: Callable[[str], object]) -> Room:
        if unused := terms.selection.unused([tensor.name for tensor in theirs.tensors]):
            raise ValueError(f"include={unused[0]!r} means no tensor of the seed")
        enter("allocate")
        return target.room_for_all(theirs, device)

    with put_off_collections(UNCOLLECTED):
        return dict(_fork(peer, _Into(room, target.build), terms, Stopwatch())[1].tensors)


@frozen
class _Terms:
    """What the caller of a fork wants; see `fork_into` for each."""

    transport: str | Transport
    deadline: float
    verify: bool
    restarts: int
    progress: Progress | None
    identity: Identity | None
    rank: Rank | None
    selection: Selection


@frozen
class _Into:
    """How what is filled is made: room for the seed's tensors; and, while a transport gets ready, the tensors in it."""

    room: Callable[[ModelLayout, Callable[[str], object]], Room]
    fill: Callable[[Room], Target]


def _fork(peer: str, into: _Into, terms: _Terms, watch: Stopwatch) -> tuple[ForkReport, Target]:
    deadline = terms.deadline
    wanted = forking.transports(terms.transport)
    watch.enter("resolve")
    with Peer(peer, deadline) as seed:
        watch.enter("hello")
        seed.greet(deadline)
        not_compared = seed.compare(terms.identity, terms.rank)
        watch.enter("layout")
        theirs = seed.layout(deadline)
        taken, left_out = theirs.only(terms.selection.takes)
        room = into.room(taken, watch.enter)
        if terms.verify:
            warm_up(room.devices)
        fill = cache(lambda: into.fill(room))
        for attempt in range(terms.restarts + 1):
            try:
                report = _copy(seed, theirs, room, fill, wanted, terms, watch)
                break
            except SeedChanged:
                if attempt == terms.restarts:
                    raise
                pause = 0.01 * 2 ** min(attempt, 5)  # a change takes its time, and restarts are counted
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    watch.enter("install")
    filled = fill()
    filled.install()
    return evolve(
        report,
        seconds=dict(watch.stop()),
        restarts=attempt,
        not_compared=(*not_compared, *([] if terms.verify else ["digests"])),
        left_out=tuple(left_out),
        left_out_by_seed=theirs.left_out,
    ), filled


def _copy(
    seed: Peer,
    theirs: ModelLayout,
    room: Room,
    fill: Callable[[], Target],
    wanted: Sequence[Transport],
    terms: _Terms,
    watch: Stopwatch,
) -> ForkReport:
    """One attempt: with the first transport that works between the two."""
    verify, deadline = terms.verify, terms.deadline
    passed_over: dict[str, str] = {}
    for transport in wanted:
        why_not = forking.reason_against(transport, seed, room.regions)
        if why_not is None:
            try:
                with forking.lease(seed, transport, room, deadline, digests=verify, enter=watch.enter) as held:
                    watch.enter("allocate")
                    into = fill()
                    watch.enter("match")
                    plan = forking.plan(held, into, seed)
                    watch.enter("verify")
                    verification = Verification(into.tensors, into.pairs, held.ours, plan.copies) if verify else None
                    try:
                        watch.enter("open")
                        held.session.ready(deadline)
                        watch.enter("transfer")
                        nbytes = forking.pull(held, plan, into, seed, deadline, terms.progress, verification)
                        watch.enter("verify")
                        forking.check(held, seed, deadline)
                        if verification is not None:
                            forking.verify(held, seed, theirs, verification, deadline)
                    finally:
                        into.touch()  # whether all of it came or some
                        if verification is not None:
                            verification.close()
                return ForkReport(
                    peer=seed.address,
                    transport=transport.name,
                    fabric=held.session.fabric,
                    tensors=len(into.tensors),
                    nbytes=nbytes,
                    generation=held.generation,
                    seconds={},
                    verified=verify,
                    passed_over=passed_over,
                )
            except TransportUnavailable as error:
                why_not = str(error)
        passed_over[transport.name] = why_not
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
    raise TransportUnavailable(f"{seed.address}: no transport works between the seed and this process: {reasons}")


def _offered(wanted: Sequence[str | Transport] | None) -> dict[str, Transport]:
    """The transports a seed offers, by name."""
    if isinstance(wanted, str):
        raise TypeError(f"transports must be a sequence of names or transports; write [{wanted!r}]")
    offered: dict[str, Transport] = {}
    for one in registry.names() if wanted is None else wanted:
        try:
            transport = one if isinstance(one, Transport) else registry.load(one)
        except TensorForkError:
            if wanted is not None:
                raise
            continue  # one of a third party's, broken; asking for it by name says why
        offered[transport.name] = transport
    return offered
