"""The limits that a fork is held against, measured beside it in workers of their own."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.bench import START, Bench, free_port
from benchmarks.measure import Measure, Outcome, interleave
from benchmarks.process import Failed, Lost, Skipped, Worker

READS = {"TCP, 64 KiB reads": 64 << 10, "TCP, 1 MiB reads": 1 << 20, "TCP, 4 MiB reads": 4 << 20}
RAW, SEND, IPC, TCP, MEMCPY = "raw copy", "NCCL send", "CUDA IPC copy", "Mooncake TCP", "memcpy"
BUFFER = 4 << 30


def tcp(bench: Bench, seed: Worker, fork: Worker) -> dict[str, Measure]:
    """One plain TCP connection from the seed's own tensors into the fork's own."""
    port = bench.ask(seed, "raw.tcp_serve")

    def reading(chunk: int) -> Measure:
        return lambda: bench.ask(fork, "raw.tcp_read", port=port, chunk=chunk)

    return {name: reading(chunk) for name, chunk in READS.items()}


def memcpy(bench: Bench, worker: Worker) -> dict[str, Measure]:
    """One core's."""
    return {MEMCPY: lambda: bench.ask(worker, "raw.memcpy")}


def buffer(bench: Bench) -> int:
    """Bytes that are copied at once."""
    return max(1 << 20, int(BUFFER * min(1.0, bench.scale)))


def raw(bench: Bench) -> dict[str, Measure]:
    """From the seed's GPU to the fork's, by one process."""
    worker = bench.start("raw", bench.sink)
    bench.ask(worker, "raw.buffers", timeout=START, nbytes=buffer(bench), source=bench.source)
    return {RAW: lambda: bench.ask(worker, "raw.copy")}


def send(bench: Bench, outcome: Outcome) -> dict[str, Measure]:
    """One NCCL message, in a group that has been used."""
    if bench.source == bench.sink:
        outcome.skipped[SEND] = "NCCL refuses two ranks on one GPU"
        return {}
    pair = [bench.start(f"nccl{rank}", device) for rank, device in enumerate((bench.source, bench.sink))]
    bench.all(pair, "raw.buffers", timeout=START, nbytes=buffer(bench))
    join(bench, pair)
    return {SEND: lambda: bench.all(pair, "raw.nccl_send")[1]}


def joins(bench: Bench, count: int) -> list[float]:
    """Make a group so many times, of fresh processes each; seconds."""
    pairs = [
        [bench.start(f"join{i}-{rank}", device, alone=True) for rank, device in enumerate((bench.source, bench.sink))]
        for i in range(count)
    ]
    bench.all([worker for pair in pairs for worker in pair], "sides.warm_up", timeout=START)
    spent = []
    for pair in pairs:
        spent.append(join(bench, pair))
        for worker in pair:
            worker.close()
    return spent


def join(bench: Bench, pair: Sequence[Worker]) -> float:
    """Make a group of the two; seconds."""
    return float(max(bench.all(pair, "raw.nccl_join", names=[worker.name for worker in pair], port=free_port())))


def ipc(bench: Bench) -> dict[str, Measure]:
    """Across two processes, over an opened handle."""
    theirs, ours = bench.start("ipc source", bench.source), bench.start("ipc sink", bench.sink)
    bench.all((theirs, ours), "raw.buffers", timeout=START, nbytes=buffer(bench))
    bench.ask(ours, "raw.ipc_open", offer=bench.ask(theirs, "raw.ipc_offer"))
    return {IPC: lambda: bench.ask(ours, "raw.ipc_copy")}


def mooncake_tcp(bench: Bench, outcome: Outcome, shape: str = "1GiB/1") -> dict[str, Measure]:
    """Mooncake's TCP, one tensor from GPU to GPU (or CPU to CPU)."""
    try:
        read = engines(bench, shape, nvlink=False)
    except (Skipped, Failed, Lost) as error:
        outcome.skipped[TCP] = str(error)
        return {}
    return {TCP: read}


def engines(bench: Bench, shape: str, *, nvlink: bool) -> Measure:
    """Two engines with a model of this shape each; reads the one's into the other's, an entry a tensor."""
    theirs, ours = bench.start("engine source", bench.source), bench.start("engine sink", bench.sink)
    bench.all((theirs, ours), "sides.warm_up", timeout=START)
    for worker in (theirs, ours):
        bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=worker is theirs)
    found = bench.ask(theirs, "peers.engine", nvlink=nvlink)
    bench.ask(ours, "peers.engine", nvlink=nvlink)
    bench.ask(ours, "peers.read", **found)
    if bench.ask(theirs, "models.sums") != bench.ask(ours, "models.sums"):
        raise Failed("Mooncake reported success, and other bytes arrived")
    return lambda: bench.ask(ours, "peers.read", **found)


def cpu_case(bench: Bench, outcome: Outcome) -> None:
    """What the host moves: a core, and a connection."""
    seed, fork = bench.start("source", "cpu"), bench.start("sink", "cpu")
    bench.all((seed, fork), "models.build", timeout=START, shape=bench.shape("1GiB/1"), placement="placed", fill=True)
    _report(bench, outcome, memcpy(bench, fork) | tcp(bench, seed, fork))


def gpu_case(bench: Bench, outcome: Outcome) -> None:
    """What the GPUs and their links move."""
    measures = raw(bench) | ipc(bench)
    host = bench.start("host", bench.sink)
    bench.ask(host, "raw.buffers", timeout=START, nbytes=buffer(bench) // 4)

    def between(into_gpu: bool) -> Measure:
        return lambda: bench.ask(host, "raw.pinned", into_gpu=into_gpu, nbytes=buffer(bench) // 4)

    measures |= {"pinned host to GPU": between(True), "GPU to pinned host": between(False)}
    measures |= send(bench, outcome)
    found = _report(bench, outcome, measures, against=RAW)
    outcome.detail["samples"] = found


def peers_case(bench: Bench, outcome: Outcome, *, shape: str) -> None:
    """What a user would do instead, with one model: the file again, a broadcast a parameter, an engine per tensor."""
    measures = raw(bench)
    pair = [bench.start(name, device) for name, device in (("source", bench.source), ("sink", bench.sink))]
    bench.all(pair, "sides.warm_up", timeout=START)
    built = bench.all(pair, "models.build", shape=bench.shape(shape), placement="placed", fill=True)[0]
    try:
        path = f"{bench.folder(int(1.05 * built['nbytes']))}/model.safetensors"
        bench.ask(pair[1], "peers.save", path=path)
        measures["safetensors from memory"] = lambda: bench.ask(pair[1], "peers.load", path=path)
    except (Skipped, Failed) as error:
        outcome.skipped["safetensors from memory"] = str(error)
    name = "NCCL, a broadcast a parameter"
    if bench.source == bench.sink:
        outcome.skipped[name] = "NCCL refuses two ranks on one GPU"
    else:
        outcome.detail["nccl_join_seconds"] = join(bench, pair)
        measures[name] = lambda: bench.all(pair, "raw.nccl_broadcast")[1]
    try:
        measures["Mooncake NVLink, a read a tensor"] = engines(bench, shape, nvlink=True)
    except (Skipped, Failed, Lost) as error:
        outcome.skipped["Mooncake NVLink, a read a tensor"] = str(error)
    measures |= mooncake_tcp(bench, outcome)
    _report(bench, outcome, measures, against=RAW)


def _report(
    bench: Bench, outcome: Outcome, measures: dict[str, Measure], against: str | None = None
) -> dict[str, list[Any]]:
    found = interleave(measures, bench.rounds, outcome)
    for name, samples in found.items():
        if name == against or against is None or not found[against]:
            outcome.add(name, samples, "GB/s")
        else:
            outcome.add(name, samples, "GB/s", limit=against, against=found[against])
    return found


def seconds_of(nbytes: int, speeds: list[float]) -> list[float]:
    """How long so many bytes take at these speeds (GB/s); the median, as one sample."""
    return [nbytes / statistics.median(speeds) / 1e9] if speeds else []
