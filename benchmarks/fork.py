"""Forks: a seed in one process, forks in others, and beside them what the same machine does without tensorfork."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import limits
from benchmarks.bench import START, Bench
from benchmarks.measure import Measure, Outcome, best, interleave
from benchmarks.process import Failed, Worker

HOST_MIB, GPU_MIB = 64.0, 16.0
"""Memory that a fork may add to either side."""
COLD_GOALS = {False: 2.5, True: 3.5}
"""Whole cold forks, to the raw copy's time; unverified and verified."""
NCCL_COLD = 1.2
"""The same for NCCL, to the time in which torch makes a group and sends."""
MANY, ROOM_MS = 10_000, 150.0
"""Room for so many new tensors is made in so long."""
SMALL = 64 << 20
"""Bytes up to which a model is forked three times as often."""
VERIFIED = {False: "unverified", True: "verified"}
Goals = dict[tuple[str, str], float]
"""(placement in the seed, placement in the fork): the least ratio to the limit."""


def cpu_case(
    bench: Bench, outcome: Outcome, *, shape: str, transport: str = "zeromq", goal: float | None = None, cold: int = 0
) -> None:
    """Within one host's memory; against one plain TCP connection between the same tensors."""
    seed = _seed(bench, outcome, shape, "placed", transport)
    if cold:
        _cold(bench, outcome, seed, transport, "arena", cold, {})
    fork = _fresh(bench, "fork", bench.sink, transport)
    bench.ask(fork, "models.build", shape=bench.shape(shape), placement="placed", fill=False)
    measures: dict[str, Measure] = {
        "unverified": _forking(bench, seed, fork, transport, verify=False),
        "verified": _forking(bench, seed, fork, transport, verify=True),
    }
    measures["unverified"]()  # a transport that cannot work here says so now
    measures |= limits.tcp(bench, seed.worker, fork) | limits.memcpy(bench, fork)
    rounds = bench.rounds * (3 if seed.nbytes <= SMALL else 1)
    found = interleave(measures, rounds, outcome)
    name, against = best({read: found[read] for read in limits.READS})
    for how in VERIFIED.values():
        _speed(outcome, f"transfer, {how}", found[how], name, against, goal if how == "unverified" else None)
        outcome.add(f"whole, warm, {how}", [one["whole"] for one in found[how]], "s")
    for read in (*limits.READS, limits.MEMCPY):
        outcome.add(read, found[read], "GB/s")
    outcome.detail |= {"warm": {how: found[how] for how in VERIFIED.values()}}
    _cost(bench, outcome, seed, fork, measures, name)
    _memory(bench, outcome, seed, fork, transport)
    _same_bytes(bench, outcome, seed, fork, transport)


def gpu_case(
    bench: Bench,
    outcome: Outcome,
    *,
    shape: str,
    transport: str,
    seed: str = "placed",
    into: Sequence[str] = ("arena", "placed"),
    goals: Goals | None = None,
    limit: str = limits.RAW,
) -> None:
    """Between GPUs (or within one): cold, by phase, in fresh processes; then warm; then memory; then the bytes."""
    published = _seed(bench, outcome, shape, seed, transport)
    beside = limits.raw(bench)
    if limit == limits.SEND:
        beside |= limits.send(bench, outcome)
    elif limit == limits.TCP:
        beside |= limits.mooncake_tcp(bench, outcome)
    for place in into:
        count = bench.cold if place == into[0] else 1
        fork = _cold(bench, outcome, published, transport, place, count, beside)
        measures: dict[str, Measure] = {
            how: _forking(bench, published, fork, transport, verify=verify) for verify, how in VERIFIED.items()
        }
        found = interleave(measures | beside, bench.rounds, outcome)
        goal = (goals or {}).get((seed, place))
        for how in VERIFIED.values():
            wanted = goal if how == "unverified" else None
            _speed(outcome, f"into {place}: transfer, {how}", found[how], limit, found.get(limit, ()), wanted)
            outcome.add(f"into {place}: whole, warm, {how}", [one["whole"] for one in found[how]], "s")
        for name in beside:
            outcome.add(f"into {place}: {name}", found[name], "GB/s")
        outcome.detail[f"warm into {place}"] = {how: found[how] for how in VERIFIED.values()}
        _memory(bench, outcome, published, fork, transport, f"into {place}: ")
        _same_bytes(bench, outcome, published, fork, transport)
        fork.close()


@dataclass
class _Seed:
    """A worker with a published model."""

    worker: Worker
    shape: str
    nbytes: int
    tensors: int
    address: str


def _seed(bench: Bench, outcome: Outcome, shape: str, placement: str, transport: str) -> _Seed:
    """Build and publish, several times; the last stays."""
    worker = _fresh(bench, "seed", bench.source, transport)
    built = bench.ask(worker, "models.build", shape=bench.shape(shape), placement=placement, fill=True)
    spent = [bench.ask(worker, "sides.publish", transports=[transport]) for _ in range(1 + bench.rounds)]
    outcome.detail |= {"nbytes": built["nbytes"], "tensors": built["tensors"], "transport": transport}
    outcome.detail["first_publish_seconds"] = spent[0]["seconds"]
    goal = 100.0 if built["tensors"] <= 300 else 500.0
    outcome.add("publish", [1e3 * one["seconds"] for one in spent[1:]], "ms", goal=goal, less=True)
    return _Seed(worker, bench.shape(shape), built["nbytes"], built["tensors"], spent[-1]["address"])


def _fresh(bench: Bench, name: str, device: str, transport: str, *, wait: bool = True) -> Worker:
    """A process with imports done and a CUDA context, and nothing else."""
    worker = bench.start(name, device, alone=True)
    worker.post("sides.warm_up", transport=transport)
    if wait:
        bench.result(worker, START)
    return worker


def _forking(bench: Bench, seed: _Seed, fork: Worker, transport: str, *, verify: bool) -> Measure:
    return lambda: bench.ask(fork, "sides.fork", address=seed.address, transport=transport, verify=verify)


def _cold(
    bench: Bench, outcome: Outcome, seed: _Seed, transport: str, place: str, count: int, beside: dict[str, Measure]
) -> Worker:
    """Fork once in each of several fresh processes; the last of them, which is warm now.

    They are all started before the first one forks, and each waits until the seed is done with the one before: what is
    measured has the machine to itself.
    """
    hows = [(verify, how) for _ in range(max(1, count)) for verify, how in VERIFIED.items()]
    ready = [_fresh(bench, f"fork{i}", bench.sink, transport, wait=False) for i in range(len(hows))]
    for worker in ready:
        bench.result(worker, START)
    joining = limits.joins(bench, max(1, count)) if limits.SEND in beside else []
    found: dict[str, list[dict[str, Any]]] = {how: [] for how in VERIFIED.values()}
    speeds: dict[str, list[float]] = {name: [] for name in beside}
    for worker, (verify, how) in zip(ready, hows, strict=True):
        for name, samples in speeds.items():
            beside[name]()
            samples.append(beside[name]())
        bench.ask(worker, "models.build", shape=seed.shape, placement="meta" if place == "arena" else place)
        bench.ask(seed.worker, "sides.settle")
        found[how].append(_forking(bench, seed, worker, transport, verify=verify)())
        if worker is not ready[-1]:
            worker.close()
    outcome.detail[f"cold into {place}"] = found
    for verify, how in VERIFIED.items():
        _judge_cold(outcome, seed, f"into {place}: whole, cold, {how}", found[how], speeds, joining, verify)
    if place == "arena" and seed.tensors >= MANY:
        spent = [1e3 * one["seconds"]["allocate"] for how in found for one in found[how]]
        outcome.add("into arena: room made, cold", spent, "ms", goal=ROOM_MS, less=True)
    return ready[-1]


def _judge_cold(
    outcome: Outcome,
    seed: _Seed,
    what: str,
    forks: Sequence[Any],
    speeds: dict[str, list[float]],
    joining: Sequence[float],
    verify: bool,
) -> None:
    """Beside the raw copy's time; for NCCL, beside the time to make a group and send."""
    limit, against, goal = None, list[float](), None
    if limits.SEND in speeds:
        limit = "joining NCCL, and its send"
        against = [statistics.median(joining) + spent for spent in limits.seconds_of(seed.nbytes, speeds[limits.SEND])]
        goal = NCCL_COLD
        outcome.detail[f"joining NCCL, for {what}"] = list(joining)
    elif limits.RAW in speeds:
        limit, against = "time of the raw copy", limits.seconds_of(seed.nbytes, speeds[limits.RAW])
        goal = COLD_GOALS[verify] if seed.tensors <= 300 and limits.TCP not in speeds else None
    outcome.add(what, [one["whole"] for one in forks], "s", limit=limit, against=against, goal=goal, less=True)


def _speed(
    outcome: Outcome,
    what: str,
    found: Sequence[dict[str, Any]],
    limit: str | None,
    against: Sequence[float],
    goal: float | None,
) -> None:
    outcome.add(what, [one["gbps"] for one in found], "GB/s", limit=limit, against=against, goal=goal)


def _cost(
    bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, measures: dict[str, Measure], limit: str | None
) -> None:
    """What it takes of the processor, on both sides together; this moves little when others use the machine too."""

    def spent(measure: Measure) -> float:
        before = bench.all((seed.worker, fork), "timing.processor")
        measure()
        after = bench.all((seed.worker, fork), "timing.processor")
        return 1e9 * (sum(after) - sum(before)) / seed.nbytes

    names = [name for name in (*VERIFIED.values(), limit) if name is not None]
    found = interleave({name: partial(spent, measures[name]) for name in names}, bench.rounds, outcome, warm=0)
    for how in VERIFIED.values():
        against = found[limit] if limit else ()
        outcome.add(f"processor time a GB, {how}", found[how], "s", limit=limit, against=against)


def _memory(bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, transport: str, prefix: str = "") -> None:
    """What one verified fork adds on either side, the seed's own digests among it."""
    seed.address = bench.ask(seed.worker, "sides.publish", transports=[transport])["address"]
    for worker in (seed.worker, fork):
        bench.ask(worker, "memory.begin")
    _forking(bench, seed, fork, transport, verify=True)()
    for side, worker in (("seed", seed.worker), ("fork", fork)):
        found = bench.ask(worker, "memory.end")
        if found["host"] is None:
            outcome.skipped[f"{prefix}memory added to the {side}"] = "the peak of a process cannot be reset here"
        else:
            outcome.add(f"{prefix}memory added to the {side}", [found["host"]], "MiB", goal=HOST_MIB, less=True)
        if "gpu" in found:
            outcome.add(f"{prefix}GPU memory added to the {side}", [found["gpu"]], "MiB", goal=GPU_MIB, less=True)
            outcome.detail[f"{prefix}device memory used more, {side}, MiB"] = found["device"]


def _same_bytes(bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, transport: str) -> None:
    """Whether what was measured unverified does what it says."""
    bench.ask(fork, "models.zero")
    _forking(bench, seed, fork, transport, verify=False)()
    if bench.ask(seed.worker, "models.sums") != bench.ask(fork, "models.sums"):
        raise Failed("the fork was reported as done, and other bytes arrived")
    outcome.detail["same_bytes"] = True
