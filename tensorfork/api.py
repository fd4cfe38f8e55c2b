"""The story: publish a model in one process, fork it in another."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tensorfork import forking, target
from tensorfork.errors import SeedChanged, TensorForkError, TransportUnavailable, UnsupportedTensor
from tensorfork.forking import Peer, Progress
from tensorfork.layout import ModelLayout, survey
from tensorfork.plan import match
from tensorfork.report import ForkReport, Stopwatch
from tensorfork.seed import Seed
from tensorfork.target import Device, Target
from tensorfork.transports import registry
from tensorfork.transports.base import Transport
from tensorfork.verify import Verification, warm_up

TIMEOUT = 300.0
"""Seconds a fork may take, unless told otherwise."""


def publish(
    model: Any,
    *,
    bind: str = "tcp://127.0.0.1:*",
    advertise: str | None = None,
    transports: Sequence[str | Transport] | None = None,
) -> Seed:
    """Let other processes fork this model, from now until the seed is closed.

    Nothing is copied, and nothing waits for a fork: the tensors are described, the current stream of each of their GPUs
    is synchronised once, and a thread begins to answer. Change the tensors in place only under `Seed.updating`.

    Args:
        model: an `nn.Module`, or a mapping of names to tensors.
        bind: the address to listen on. Whoever reaches it can read the model: it is loopback unless told otherwise.
        advertise: the host, or host:port, by which forks reach it; needed with ``tcp://0.0.0.0:*``.
        transports: names or instances to offer; all that work here, by default.

    Raises:
        TypeError: it is not a model.
        UnsupportedTensor: one of its tensors cannot be forked; the message names it.
        TransportUnavailable: one of the transports named cannot work here.
        OSError: the address cannot be listened on.
    """
    layout, tensors, memory = survey(model)
    if lost := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise UnsupportedTensor(f"{lost[0]} is on the meta device and has no bytes to fork; load the model first")
    gpus = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    for device in gpus:
        torch.cuda.current_stream(device).synchronize()
    warm_up(gpus)
    return Seed(layout, tensors, memory, _offered(transports), bind, advertise)


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
) -> ForkReport:
    """Fill the model's tensors with those of the seed at `peer`, in place: same objects, same storages, same ties.

    Tensors on the meta device get memory on `device`, in one allocation for each device and sharing storages as the
    seed's do, once everything has been verified; until then, and after any failure, they stay meta.

    Args:
        model: an `nn.Module` or a mapping of names to tensors, with the seed's names, dtypes, shapes and strides.
        peer: the seed's address, as `Seed.address` says it.
        device: where meta tensors go; as in the seed, by default (one GPU: to the current one).
        transport: "auto", a name, or a `Transport`.
        timeout: seconds for everything.
        verify: compare the digest of every tensor with the seed's.
        restarts: how often to begin again when the seed's weights change under the fork.
        progress: called with the bytes that have arrived, and the bytes there are.

    Raises:
        TensorForkError: see docs/errors.md for each kind, and for the state it leaves the model in.
        TypeError, ValueError: bad arguments; nothing was touched.
    """
    ours, tensors, memory = survey(model)

    def prepare(theirs: ModelLayout, enter: Callable[[str], object]) -> Target:
        enter("match")
        pairs = match(theirs, ours)
        enter("allocate")
        return target.prepare(pairs, theirs, ours, tensors, memory, device)

    return _fork(peer, prepare, transport, timeout, verify, restarts, progress)[0]


def fork(
    peer: str,
    *,
    device: Device = None,
    transport: str | Transport = "auto",
    timeout: float = TIMEOUT,
    verify: bool = True,
    restarts: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """All tensors of the seed at `peer`, by name, in new memory on `device`; ties are one tensor under several names.

    The arguments and errors are those of `fork_into`. After a failure there is nothing.
    """

    def prepare(theirs: ModelLayout, enter: Callable[[str], object]) -> Target:
        enter("allocate")
        return target.build(theirs, device)

    return dict(_fork(peer, prepare, transport, timeout, verify, restarts, progress)[1].tensors)


def _fork(
    peer: str,
    prepare: Callable[[ModelLayout, Callable[[str], object]], Target],
    transport: str | Transport,
    timeout: float,
    verify: bool,
    restarts: int,
    progress: Progress | None,
) -> tuple[ForkReport, Target]:
    watch = Stopwatch()
    deadline = time.monotonic() + timeout
    wanted = forking.transports(transport)
    watch.enter("resolve")
    with Peer(peer, deadline) as seed:
        watch.enter("hello")
        seed.greet(deadline)
        watch.enter("layout")
        theirs = seed.layout(deadline)
        into = prepare(theirs, watch.enter)
        if verify:
            warm_up({tensor.device for tensor in into.tensors.values()})
        for attempt in range(restarts + 1):
            try:
                report = _copy(seed, theirs, into, wanted, deadline, verify, progress, watch)
                break
            except SeedChanged:
                if attempt == restarts:
                    raise
                pause = min(0.01 * 2**attempt, 0.5)  # a change takes its time, and restarts are counted
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
    into.install()
    into.touch()
    return report.finished(watch.stop(), attempt), into


def _copy(
    seed: Peer,
    theirs: ModelLayout,
    into: Target,
    wanted: Sequence[Transport],
    deadline: float,
    verify: bool,
    progress: Progress | None,
    watch: Stopwatch,
) -> ForkReport:
    """One attempt: with the first transport that works between the two."""
    passed_over: dict[str, str] = {}
    for transport in wanted:
        why_not = forking.reason_against(transport, seed, into.regions)
        if why_not is None:
            try:
                with forking.lease(seed, transport, into, deadline, digests=verify, enter=watch.enter) as held:
                    watch.enter("match")
                    plan = forking.plan(held, into)
                    verification = Verification(into.tensors, into.pairs, held.ours, plan.copies) if verify else None
                    try:
                        watch.enter("transfer")
                        nbytes = forking.pull(held, plan, into, seed, deadline, progress, verification)
                        forking.check(held, seed, deadline)
                        if verification is not None:
                            watch.enter("verify")
                            forking.verify(held, seed, theirs, verification, deadline)
                    finally:
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
