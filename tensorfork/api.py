"""The public functions: publish a model in one process, fork it in another. `tensorfork.fork.steps` has a fork's steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import evolve

from tensorfork.digest import warm_up
from tensorfork.errors import UnsupportedTensor
from tensorfork.fork import destination, steps
from tensorfork.fork.destination import DestinationMemory
from tensorfork.fork.exclusive import exclusive_fill
from tensorfork.fork.match import match
from tensorfork.fork.new_storages import Device, named_device
from tensorfork.fork.steps import Filling, Terms
from tensorfork.fork.transfer import Progress
from tensorfork.identity import Identity, Rank
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.layout import ModelLayout
from tensorfork.model.describe import describe
from tensorfork.model.selection import Patterns, Selection
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.seed.handle import Seed
from tensorfork.transports import registry
from tensorfork.transports.base import Transport

TIMEOUT = 300.0
"""Seconds that a fork may take, unless the caller says otherwise."""
GC_PAUSE = 2.0
"""Seconds of a fork in which no garbage is collected, at most. Forks over NVLink have ended by then."""


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
    with gc_paused():
        model_here = describe(model, Selection(include, exclude), identity, rank)
        if meta := [name for name, tensor in model_here.tensors.items() if tensor.is_meta]:
            raise UnsupportedTensor(f"{meta[0]} is on the meta device and has no bytes to fork; load the model first")
        gpus = {tensor.device for tensor in model_here.tensors.values() if tensor.is_cuda}
    for device in gpus:
        torch.cuda.current_stream(device).synchronize()
    warm_up.begin(gpus)
    offered = registry.offered(transports)
    with gc_paused():
        return Seed(model_here.layout, model_here.tensors, model_here.memory, offered, bind, advertise)


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
    terms = _terms(timeout, transport, verify, restarts, progress, identity, rank, Selection(include, exclude))
    with gc_paused(GC_PAUSE):
        watch = Stopwatch()
        watch.enter("survey")
        ours = describe(model, terms.selection)
        if verify:
            warm_up.begin({tensor.device for tensor in ours.tensors.values()} | named_device(device))

        def allocate(theirs: ModelLayout, enter: Callable[[str], object]) -> DestinationMemory:
            enter("match")
            pairs = match(theirs, ours.layout)
            enter("allocate")
            return destination.memory_for(pairs, theirs, ours, device)

        with exclusive_fill(ours):
            filling = Filling(allocate, lambda memory: destination.tensors_of_model(ours, memory))
            report, _ = steps.run(peer, filling, terms, watch)
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
    terms = _terms(timeout, transport, verify, restarts, progress, identity, rank, Selection(include, exclude))
    if verify:
        warm_up.begin(named_device(device))

    def allocate(theirs: ModelLayout, enter: Callable[[str], object]) -> DestinationMemory:
        if unused := terms.selection.unmatched([tensor.name for tensor in theirs.tensors]):
            raise ValueError(f"include={unused[0]!r} means no tensor of the seed")
        enter("allocate")
        return destination.memory_for_all(theirs, device)

    with gc_paused(GC_PAUSE):
        _, copied = steps.run(peer, Filling(allocate, destination.tensors_of_copy), terms, Stopwatch())
        return dict(copied.tensors)


def _terms(timeout: float, transport: str | Transport, *rest: Any) -> Terms:
    return Terms(transport, time.monotonic() + timeout, *rest)
