"""Forks between processes, beside the limits of the same machine, which are measured without tensorfork."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import limits
from benchmarks.bench import START_TIMEOUT, Bench
from benchmarks.measure import Measure, Outcome, best, interleave
from benchmarks.process import Failed, Worker

HOST_MIB, GPU_MIB = 64.0, 16.0
"""Goals: the memory that a fork may add to either side."""
COLD_GOALS = {False: 2.5, True: 3.5}
"""Goals: a whole cold fork's time to the raw copy's; unverified and verified."""
NCCL_COLD = 1.2
"""The same for NCCL, to the time in which torch makes a group and sends the bytes."""
SURVEY_MS = 15.0
"""Goal: a model of up to a thousand tensors is walked and described in so long, on a machine with GPUs."""
MANY_TENSORS, ALLOCATE_MS = 10_000, 150.0
"""Goal: the memory for so many new tensors is allocated in so long."""
SMALL_BYTES = 64 << 20
"""A model of up to so many bytes is forked three times as often."""
STABLE = "unverified, stable"
VERIFIED = {False: "unverified", True: "verified"}
Goals = dict[tuple[str, str], float]
"""The least ratio to the limit, by (placement in the seed, placement in the fork)."""


def cpu_case(
    bench: Bench,
    outcome: Outcome,
    *,
    shape: str,
    transport: str = "zeromq",
    goal: float | None = None,
    stable_goal: float | None = None,
    cold: int = 0,
) -> None:
    """Within one host's memory, beside one plain TCP connection between the same tensors.

    With a `stable_goal`, a second seed publishes the same model with `stable=True`.
    """
    seed = _publish(bench, outcome, shape, "placed", transport)
    if cold:
        _cold(bench, outcome, seed, transport, "arena", cold, {})
    fork = start(bench, "fork", bench.sink, transport)
    bench.ask(fork, "models.build", shape=bench.shape(shape), placement="placed", fill=False)
    measures: dict[str, Measure] = {
        "unverified": _forking(bench, seed, fork, transport, verify=False),
        "verified": _forking(bench, seed, fork, transport, verify=True),
    }
    measures["unverified"]()  # a transport that does not work here raises Skipped now
    if stable_goal is not None:
        measures[STABLE] = _forking(bench, _publish_stable(bench, shape, transport), fork, transport, verify=False)
    measures |= limits.tcp(bench, seed.worker, fork) | limits.memcpy(bench, fork)
    rounds = bench.rounds * (3 if seed.nbytes <= SMALL_BYTES else 1)
    values = interleave(measures, rounds, outcome)
    name, against = best({read: values[read] for read in limits.READS})
    for mode in VERIFIED.values():
        _speed(outcome, f"transfer, {mode}", values[mode], name, against, goal if mode == "unverified" else None)
        outcome.add(f"whole, warm, {mode}", [one["whole"] for one in values[mode]], "s")
    if stable_goal is not None:
        _speed(outcome, f"transfer, {STABLE}", values[STABLE], name, against, stable_goal)
    for read in (*limits.READS, limits.MEMCPY):
        outcome.add(read, values[read], "GB/s")
    outcome.detail |= {"warm": {mode: values[mode] for mode in VERIFIED.values()}}
    _processor_time(bench, outcome, seed, fork, measures, name)
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
    cold_goals: Mapping[bool, float] = COLD_GOALS,
) -> None:
    """Between GPUs, or within one: cold in fresh processes, warm, the memory added, and whether the bytes arrive."""
    published = _publish(bench, outcome, shape, seed, transport)
    limit_measures = limits.raw(bench)
    if limit == limits.SEND:
        limit_measures |= limits.send(bench, outcome)
    elif limit == limits.TCP:
        limit_measures |= limits.mooncake_tcp(bench, outcome)
    for placement in into:
        count = bench.cold if placement == into[0] else 1
        fork = _cold(bench, outcome, published, transport, placement, count, limit_measures, cold_goals)
        measures: dict[str, Measure] = {
            mode: _forking(bench, published, fork, transport, verify=verify) for verify, mode in VERIFIED.items()
        }
        values = interleave(measures | limit_measures, bench.rounds, outcome)
        goal, against = (goals or {}).get((seed, placement)), values.get(limit, ())
        for verify, mode in VERIFIED.items():
            what = f"into {placement}: transfer, {mode}"
            _speed(outcome, what, values[mode], limit, against, None if verify else goal)
            outcome.add(f"into {placement}: whole, warm, {mode}", [one["whole"] for one in values[mode]], "s")
        for name in limit_measures:
            outcome.add(f"into {placement}: {name}", values[name], "GB/s")
        outcome.detail[f"warm into {placement}"] = {mode: values[mode] for mode in VERIFIED.values()}
        _memory(bench, outcome, published, fork, transport, f"into {placement}: ")
        _same_bytes(bench, outcome, published, fork, transport)
        fork.close()


def start(
    bench: Bench,
    name: str,
    device: str,
    transport: str,
    *,
    env: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Worker:
    """Start a process with imports done and a CUDA context, and nothing else.

    Without `wait` it may not be ready yet; the caller has to take the result of `api.warm_up`.
    """
    worker = bench.start(name, device, own_gpu=True, env=env)
    worker.post("api.warm_up", transport=transport)
    if wait:
        bench.result(worker, START_TIMEOUT)
    return worker


@dataclass
class _Seed:
    """A worker with a published model."""

    worker: Worker
    shape: str
    nbytes: int
    tensors: int
    address: str


def _publish(bench: Bench, outcome: Outcome, shape: str, placement: str, transport: str) -> _Seed:
    """Build a model in a new worker and publish it several times; the last seed stays open."""
    worker = start(bench, "seed", bench.source, transport)
    built = bench.ask(worker, "models.build", shape=bench.shape(shape), placement=placement, fill=True)
    publishes = [bench.ask(worker, "api.publish", transports=[transport]) for _ in range(1 + bench.rounds)]
    outcome.detail |= {"nbytes": built["nbytes"], "tensors": built["tensors"], "transport": transport}
    outcome.detail["first_publish_seconds"] = publishes[0]["seconds"]
    goal = 100.0 if built["tensors"] <= 300 else 500.0
    outcome.add("publish", [1e3 * one["seconds"] for one in publishes[1:]], "ms", goal=goal, less=True)
    return _Seed(worker, bench.shape(shape), built["nbytes"], built["tensors"], publishes[-1]["address"])


def _publish_stable(bench: Bench, shape: str, transport: str) -> _Seed:
    """The same model in another worker, published with the promise that its memory stays where it is."""
    worker = start(bench, "stable seed", bench.source, transport)
    built = bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=True)
    address = bench.ask(worker, "api.publish", transports=[transport], stable=True)["address"]
    return _Seed(worker, bench.shape(shape), built["nbytes"], built["tensors"], address)


def _forking(bench: Bench, seed: _Seed, fork: Worker, transport: str, *, verify: bool) -> Measure:
    return lambda: bench.ask(fork, "api.fork", address=seed.address, transport=transport, verify=verify)


def _cold(
    bench: Bench,
    outcome: Outcome,
    seed: _Seed,
    transport: str,
    placement: str,
    count: int,
    limit_measures: dict[str, Measure],
    goals: Mapping[bool, float] = COLD_GOALS,
) -> Worker:
    """Fork once in each of several fresh processes; returns the last of them, which is warm now.

    All of them are started before the first one forks, and each waits until the seed has finished the fork before, so
    that nothing else runs while one is measured.
    """
    modes = [(verify, mode) for _ in range(max(1, count)) for verify, mode in VERIFIED.items()]
    workers = [start(bench, f"fork{i}", bench.sink, transport, wait=False) for i in range(len(modes))]
    for worker in workers:
        bench.result(worker, START_TIMEOUT)
    join_seconds = limits.joins(bench, max(1, count)) if limits.SEND in limit_measures else []
    forks: dict[str, list[dict[str, Any]]] = {mode: [] for mode in VERIFIED.values()}
    speeds: dict[str, list[float]] = {name: [] for name in limit_measures}
    for worker, (verify, mode) in zip(workers, modes, strict=True):
        for name, samples in speeds.items():
            limit_measures[name]()
            samples.append(limit_measures[name]())
        bench.ask(worker, "models.build", shape=seed.shape, placement="meta" if placement == "arena" else placement)
        bench.ask(seed.worker, "api.wait_until_idle")
        forks[mode].append(_forking(bench, seed, worker, transport, verify=verify)())
        if worker is not workers[-1]:
            worker.close()
    outcome.detail[f"cold into {placement}"] = forks
    for verify, mode in VERIFIED.items():
        what = f"into {placement}: whole, cold, {mode}"
        _judge_cold(outcome, seed, what, forks[mode], speeds, join_seconds, goals[verify])
    survey_ms = [1e3 * one["seconds"]["survey"] for mode in forks for one in forks[mode]]
    survey_goal = SURVEY_MS if placement == "arena" and seed.tensors < MANY_TENSORS and limit_measures else None
    outcome.add(f"into {placement}: our own model surveyed, cold", survey_ms, "ms", goal=survey_goal, less=True)
    if placement == "arena" and seed.tensors >= MANY_TENSORS:
        allocate_ms = [1e3 * one["seconds"]["allocate"] for mode in forks for one in forks[mode]]
        outcome.add("into arena: room made, cold", allocate_ms, "ms", goal=ALLOCATE_MS, less=True)
    return workers[-1]


def _judge_cold(
    outcome: Outcome,
    seed: _Seed,
    what: str,
    forks: Sequence[Any],
    speeds: dict[str, list[float]],
    join_seconds: Sequence[float],
    goal_of_whole: float,
) -> None:
    """Add whole cold forks beside the raw copy's time or, for NCCL, the time to make a group and send the bytes."""
    limit, against, goal = None, list[float](), None
    if limits.SEND in speeds:
        limit = "joining NCCL, and its send"
        join = statistics.median(join_seconds)
        against = [join + seconds for seconds in limits.seconds_of(seed.nbytes, speeds[limits.SEND])]
        goal = NCCL_COLD
        outcome.detail[f"joining NCCL, for {what}"] = list(join_seconds)
    elif limits.RAW in speeds:
        limit, against = "time of the raw copy", limits.seconds_of(seed.nbytes, speeds[limits.RAW])
        goal = goal_of_whole if seed.tensors < 1000 and limits.TCP not in speeds else None
    outcome.add(what, [one["whole"] for one in forks], "s", limit=limit, against=against, goal=goal, less=True)


def _speed(
    outcome: Outcome,
    what: str,
    forks: Sequence[dict[str, Any]],
    limit: str | None,
    against: Sequence[float],
    goal: float | None,
) -> None:
    outcome.add(what, [one["gbps"] for one in forks], "GB/s", limit=limit, against=against, goal=goal)


def _processor_time(
    bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, measures: dict[str, Measure], limit: str | None
) -> None:
    """The processor time of both sides together, which varies little when others use the machine too."""

    def cpu_seconds_a_gb(measure: Measure) -> float:
        before = bench.ask_all((seed.worker, fork), "interpreter.cpu_seconds")
        measure()
        after = bench.ask_all((seed.worker, fork), "interpreter.cpu_seconds")
        return 1e9 * (sum(after) - sum(before)) / seed.nbytes

    names = [name for name in (*VERIFIED.values(), limit) if name is not None]
    timed: dict[str, Measure] = {name: partial(cpu_seconds_a_gb, measures[name]) for name in names}
    values = interleave(timed, bench.rounds, outcome, warm_up=0)
    for mode in VERIFIED.values():
        against = values[limit] if limit else ()
        outcome.add(f"processor time a GB, {mode}", values[mode], "s", limit=limit, against=against)


def _memory(bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, transport: str, prefix: str = "") -> None:
    """The memory that one verified fork adds on either side, while the seed computes its digests too."""
    seed.address = bench.ask(seed.worker, "api.publish", transports=[transport])["address"]
    for worker in (seed.worker, fork):
        bench.ask(worker, "memory.start_recording")
    _forking(bench, seed, fork, transport, verify=True)()
    for side, worker in (("seed", seed.worker), ("fork", fork)):
        peaks = bench.ask(worker, "memory.stop_recording")
        if peaks["host"] is None:
            outcome.skipped[f"{prefix}memory added to the {side}"] = "the peak of a process cannot be reset here"
        else:
            outcome.add(f"{prefix}memory added to the {side}", [peaks["host"]], "MiB", goal=HOST_MIB, less=True)
        if "gpu" in peaks:
            outcome.add(f"{prefix}GPU memory added to the {side}", [peaks["gpu"]], "MiB", goal=GPU_MIB, less=True)
            outcome.detail[f"{prefix}device memory used more, {side}, MiB"] = peaks["device"]


def _same_bytes(bench: Bench, outcome: Outcome, seed: _Seed, fork: Worker, transport: str) -> None:
    """Fork unverified into zeroed memory; raises `Failed` unless the right bytes arrive."""
    bench.ask(fork, "models.zero")
    _forking(bench, seed, fork, transport, verify=False)()
    if bench.ask(seed.worker, "models.sums") != bench.ask(fork, "models.sums"):
        raise Failed("the fork reported success, and other bytes arrived")
    outcome.detail["same_bytes"] = True
