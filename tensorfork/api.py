"""The public functions: publish a model in one process, fork it in another. The steps of a fork are in `fork.steps`."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
from typing import Any

import torch
from attrs import evolve

from tensorfork.digest import warm_up
from tensorfork.digest.batch import DigestBatch
from tensorfork.digest.record import Digests
from tensorfork.exhaustion import resources
from tensorfork.fork import destination, steps
from tensorfork.fork.destination import DestinationMemory
from tensorfork.fork.exclusive import exclusive_fill
from tensorfork.fork.match import match
from tensorfork.fork.rename import Rename, namer
from tensorfork.fork.seed_digests import seed_digests
from tensorfork.fork.seed_names import SeedNames
from tensorfork.fork.steps import Filling
from tensorfork.fork.terms import Progress, Terms
from tensorfork.fork.values import OurValues
from tensorfork.identity import Identity, Rank
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.layout import ModelLayout
from tensorfork.lineage import Version, check_wanted
from tensorfork.model.describe import ModelSource, check_mapped, describe
from tensorfork.model.devices import Device, usable_device
from tensorfork.model.inherited import remember_version, version_of
from tensorfork.model.modes import in_normal_mode
from tensorfork.model.selection import Patterns, Selection
from tensorfork.model.snapshot import snapshot as take_snapshot
from tensorfork.model.value_policy import ValuePolicy
from tensorfork.patience import Check
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.seed.address import listening_address
from tensorfork.seed.handle import Seed
from tensorfork.seed.limits import Limits
from tensorfork.seed.publication import check_publishable
from tensorfork.transports import registry
from tensorfork.transports.base import Transport
from tensorfork.validators import flag, seconds, stall_seconds
from tensorfork.wire.conversation import STALL, peer_address

TIMEOUT = 300.0
"""Seconds that a fork may take, by default."""
GC_PAUSE = 2.0
"""Seconds of a fork for which garbage collection is paused, at most. Forks over NVLink have ended by then."""


@in_normal_mode
@resources()
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
    stable: bool = False,
    snapshot: bool | str | torch.device = False,
    version: Version | str | None = None,
    leases: int = 64,
    leases_per_connection: int = 4,
    stall: float = STALL,
    rate_limit: float | None = None,
) -> Seed:
    """Let other processes fork this model, from now until the seed is closed.

    Nothing is copied, and nothing waits for a fork: the tensors are described, the current stream of each of their GPUs
    is synchronised once, and a thread starts to answer forks. Change the model only under `Seed.updating`, and unmap
    its memory only between `Seed.suspend` and `Seed.resume`. A seed that was not closed is closed at exit.

    Args:
        model: an `nn.Module`, all of whose tensors are published (docs/reliability.md says where they are found); or a
            mapping of names to tensors, which are published as they are.
        bind: the address to listen on, loopback by default. Whoever reaches it can read the model.
        advertise: the host, or host:port, by which forks reach the seed; needed with ``tcp://0.0.0.0:*``.
        transports: names or instances to offer; by default all that work in this process.
        identity: which model this is; compared with the identity of each fork that gives one.
        rank: which part of the model this process holds; compared with the rank of each fork that gives one.
        include: the tensors to publish, by name or by pattern with ``*`` and ``?``; a name stands for all that lies
            under it too. By default all are published.
        exclude: the tensors to leave out, in the same form: caches, and integers that hold addresses or handles.
        stable: promise that the tensors' memory on the CPU stays where it is until the seed is closed. Then it is sent
            without a copy, some 1.4 times as fast over ZeroMQ. If it moves all the same, or maps a file that is
            truncated, the process may end.
        snapshot: publish a copy of the model as it is now, made here: True for one on the same devices, or a device,
            such as ``cpu``. Ties and shared memory are kept. Whatever becomes of the model, the copy stays, and takes
            its memory, until the seed is closed.
        version: which weights these are: a label, or the `Version` that a fork's report has. A model that was forked
            into, and not changed since, has that version by itself; any other begins a lineage of its own.
        leases: how many the seed grants at once. Each fork takes one; `PeerRefused` tells those beyond.
        leases_per_connection: how many of them one connection may have.
        stall: seconds, 0.1 at least, in which a fork's process must give a sign of life. Its libzmq gives it, also
            while its interpreter is busy; a process that is stopped does not, and its leases end.
        rate_limit: bytes a second of all forks together, over every transport. The seed sends no faster; forks that
            read by themselves are told what each may read, and obey (docs/transports.md). By default there is no limit.

    Raises:
        TypeError: it is not a model, or an argument is of another type.
        ValueError: `include` names a tensor that the model does not have, or an address cannot be used.
        UnsupportedTensor: one of its tensors cannot be forked; the message names it.
        TransportUnavailable: one of the transports named cannot work here, or cannot hold `rate_limit`.
        ResourceExhausted: this process has no memory, file descriptors or threads left for it.
        OSError: the address cannot be listened on.
    """
    bound, advertised = listening_address(bind, advertise)
    check_wanted(version, None)
    flag("stable", stable)
    limits = Limits(leases=leases, leases_per_connection=leases_per_connection, stall=stall, rate_limit=rate_limit)
    copy_to = None if isinstance(snapshot, bool) else usable_device(snapshot, "snapshot")
    source = ModelSource(model, Selection(include, exclude), identity, rank)
    with gc_paused():
        found = source.describe()
        check_publishable(found)
        gpus = {tensor.device for tensor in found.tensors.values() if tensor.is_cuda}
    for device in gpus:
        torch.cuda.current_stream(device).synchronize()
    warm_up.begin(gpus)
    offered = registry.offered(transports, limited=limits.rate_limit is not None)
    first = version_of(found.tensors, version)
    with gc_paused():
        if snapshot is False:
            return Seed(found, source, offered, first, stable, bound, advertised, limits)
        copied = take_snapshot(found, copy_to)
        return Seed(copied, None, offered, first, True, bound, advertised, limits)


@in_normal_mode
@resources()
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
    rename: Rename = None,
    wait: float = 0.0,
    version: Version | str | None = None,
    at_least: Version | int | None = None,
    arena: bool = True,
    cancel: Event | None = None,
    trace: str | None = None,
    stall: float = STALL,
    values: str | ValuePolicy = "report",
) -> ForkReport:
    """Fill the model's tensors with those of the seed at `peer`, in place: same objects, same storages, same ties.

    Tensors on the meta device get memory on `device`, in one allocation for each device, and go on sharing storages as
    they do: two that are one in the seed get a copy each. They take the seed's strides. They get memory once everything
    has been verified; until then, and after any failure, they stay meta.

    If the model is itself published, fill it under its seed's `Seed.updating`, as any change of it: otherwise its forks
    may take a mixture of old and new. Garbage collection is paused for the first two seconds, at most
    (docs/process_settings.md). docs/errors.md says how a fork is cancelled.

    Args:
        model: an `nn.Module` or a mapping of names to tensors, with the seed's names, dtypes, shapes and, where they
            have memory, strides: built by the same code, and at the same stage of its life as the seed's was when it
            was published.
        peer: the seed's address, as in `Seed.address`.
        device: where meta tensors go, ``cpu`` or one of CUDA's GPUs; by default to the devices of the seed's, or to the
            current GPU if the seed's are on a single one.
        transport: "auto", a name, or a `Transport`.
        timeout: seconds for everything: more than 0, and a day, 86,400, at most.
        verify: compare the digest of every tensor with the seed's.
        restarts: how often to begin again when the seed's weights change under the fork. If it has published other
            tensors by then, they are matched anew.
        progress: called with the bytes that have arrived and the bytes in all, on this thread. An exception that it
            raises ends the fork.
        identity: which model this is. The seed's must be equal; it is compared before anything else.
        rank: which part of the model this process holds. The seed's must be equal, except for data parallelism.
        include: the tensors to fill, by name or by pattern with ``*`` and ``?``; a name stands for all that lies under
            it too. By default all are filled.
        exclude: the tensors to leave as they are, in the same form. What the seed excludes must be excluded here too.
        rename: what our tensors are called in the seed, where that is not what they are called here. A mapping of the
            beginnings of our names to what takes their place: ``{"_orig_mod.": ""}``, or ``{"": "_orig_mod."}`` where
            the seed is the one that is compiled. A key ends where a part of a name does, and ``*`` in it stands for one
            part: ``{"layers.*._orig_mod.": "layers.*."}``. Of several that fit the longest counts. Or a function from
            our name to the seed's, called for every tensor before the seed is asked, and later for plain values (where
            it fails for one, that value is not compared). Patterns, errors and the report have our names; only what the
            seed alone has goes by the seed's.
        wait: seconds from the beginning in which a seed may still be starting, or is suspended, within the timeout;
            ``inf`` for as long as that lasts. Until then the fork tries again to reach a seed where nobody answers, and
            asks again one that is suspended; the latter, with `restarts`, until its timeout in any case. Without it, a
            refused connection is an error at once, a host that is silent after 4 seconds.
        version: the version that the seed must have: a label, or a `Version`, whose content is compared too if known.
        at_least: the oldest version that will do, in its lineage; or a counter, of any lineage.
        arena: whether new tensors on a device lie in one allocation, which is fastest to fill, and free once all of
            them are. Without, each storage is an allocation of its own: for models that free tensors one by one.
        cancel: an event that cancels the fork when another thread sets it; `ForkCancelled` is then raised, mostly
            within 0.3 seconds. It may also be one of multiprocessing's.
        trace: the trace id by which the logs of both sides, the report and the errors name this fork: 32 hexadecimal
            digits, as in a `traceparent` of W3C Trace Context. By default a random one.
        stall: seconds, 0.1 at least, in which the seed's process must give a sign of life. Its libzmq gives it, also
            while its interpreter is busy; a process that is stopped does not. What fails then says so.
        values: what to do about plain values beside the tensors (numbers, texts, ...) that are not the seed's:
            "report" has them in the report and logs them once; "strict" raises `ValueMismatch` before anything is
            copied; "ignore" does not compare. A `ValuePolicy` may also allow some, and take some over.

    Raises:
        TensorForkError: docs/errors.md lists each kind, and the state in which it leaves the model.
        TypeError, ValueError: bad arguments, or another fork into the model is in progress; nothing was touched. Bad
            arguments are found before the model is walked and the peer is asked.
    """
    peer_address(peer)
    selection, policy = Selection(include, exclude), ValuePolicy.of(values)
    name_of = None if rename is None else namer(rename)
    with gc_paused(GC_PAUSE):
        watch = Stopwatch()
        watch.enter("survey")
        terms = Terms(
            timeout=timeout,
            wait=wait,
            stall=stall,
            restarts=restarts,
            cancel=cancel,
            trace=trace,
            device=device,
            arena=arena,
            verify=verify,
            progress=progress,
            identity=identity,
            rank=rank,
            version=version,
            at_least=at_least,
            transports=transport,
        )
        ours = describe(model, selection)
        check_mapped(ours, writing=True)
        names = SeedNames.of(ours.layout, selection, name_of)
        if verify:
            warm_up.begin({tensor.device for tensor in ours.tensors.values()} | terms.named_devices)

        def allocate(theirs: ModelLayout, enter: Callable[[str], object], check: Check) -> DestinationMemory:
            enter("match")
            pairs = match(theirs, ours.layout, names.renamed, check)
            enter("allocate")
            return destination.memory_for(pairs, theirs, ours, terms.device, arena=arena)

        with exclusive_fill(ours):
            our_values = OurValues.of(ours.visited, policy, name_of)
            filling = Filling(allocate, partial(destination.tensors_of_model, ours), names, our_values)
            report, _ = steps.run(peer, filling, terms, watch)
            remember_version(ours.tensors, report.version)
        return evolve(report, left_out=tuple(dict.fromkeys([*ours.layout.left_out, *report.left_out])))


@in_normal_mode
@resources()
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
    wait: float = 0.0,
    version: Version | str | None = None,
    at_least: Version | int | None = None,
    arena: bool = True,
    cancel: Event | None = None,
    trace: str | None = None,
    stall: float = STALL,
) -> dict[str, torch.Tensor]:
    """Copy all tensors of the seed at `peer` into new memory on `device`, and return them by name.

    Tied tensors are one tensor under several names, and storages are shared as the seed's are. The arguments and errors
    are those of `fork_into`. After a failure nothing is kept. There is no model here with plain values to compare.
    """
    peer_address(peer)
    selection = Selection(include, exclude)
    terms = Terms(
        timeout=timeout,
        wait=wait,
        stall=stall,
        restarts=restarts,
        cancel=cancel,
        trace=trace,
        device=device,
        arena=arena,
        verify=verify,
        progress=progress,
        identity=identity,
        rank=rank,
        version=version,
        at_least=at_least,
        transports=transport,
    )
    if verify:
        warm_up.begin(terms.named_devices)

    def allocate(theirs: ModelLayout, enter: Callable[[str], object], check: Check) -> DestinationMemory:
        if unused := selection.unmatched([tensor.name for tensor in theirs.tensors]):
            raise ValueError(f"include={unused[0]!r} means no tensor of the seed")
        enter("allocate")
        return destination.memory_for_all(theirs, terms.device, arena=arena)

    with gc_paused(GC_PAUSE):
        filling = Filling(allocate, destination.tensors_of_copy, SeedNames({}, selection))
        report, copied = steps.run(peer, filling, terms, Stopwatch())
        remember_version(copied.tensors, report.version)
        return dict(copied.tensors)


@in_normal_mode
@resources()
def digests(
    source: Any,
    *,
    timeout: float = TIMEOUT,
    identity: Identity | None = None,
    rank: Rank | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    stall: float = STALL,
) -> Digests:
    """The digest of every tensor of a seed, or of a model of this process, by name. Nothing is copied.

    A seed computes its digests once for each generation of its weights, when somebody first asks, and keeps them. It is
    asked under a lease, as by a fork: it looks whether its tensors are where it published them, and all digests are of
    one generation. What was written into its weights outside of `Seed.updating` since is not in them. For a model of
    this process they are computed now, on the current streams; `publish` is not needed.

    Args:
        source: a seed's address, an `nn.Module`, or a mapping of names to tensors, such as a checkpoint's.
        timeout: seconds for everything, where a seed is asked; a day at most.
        identity: which model it is to be; compared with the seed's.
        rank: which part of it; compared with the seed's.
        include: the tensors whose digests are wanted, by name or by pattern as in `fork_into`. By default all.
        exclude: the tensors to leave out, in the same form.
        stall: as in `fork_into`, where a seed is asked.

    Raises:
        TensorForkError: as `fork_into`; where the seed's weights change meanwhile, `SeedChanged`.
        UnsupportedTensor: a tensor of the model has no bytes, or is of a kind that cannot be published.
        TypeError, ValueError: bad arguments.
    """
    selection = Selection(include, exclude)
    if isinstance(source, str):
        peer_address(source)
        deadline = time.monotonic() + seconds("timeout", timeout)
        return seed_digests(source, deadline, stall_seconds("stall", stall), identity, rank, selection)
    if identity is not None or rank is not None:
        raise TypeError("identity= and rank= are compared with a seed's; a model has none")
    model = describe(source, selection)
    check_publishable(model)
    return Digests.of(DigestBatch.of(model.tensors).compute())
