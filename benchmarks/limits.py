"""The limits and baselines that a fork is compared with, measured beside it in workers of their own."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.bench import START_TIMEOUT, Bench, free_port
from benchmarks.measure import Measure, Outcome, interleave
from benchmarks.process import Failed, Lost, Skipped, Worker

READS = {"TCP, 64 KiB reads": 64 << 10, "TCP, 1 MiB reads": 1 << 20, "TCP, 4 MiB reads": 4 << 20}
RAW, SEND, IPC, TCP, MEMCPY = "raw copy", "NCCL send", "CUDA IPC copy", "Mooncake TCP", "memcpy"
BUFFER_BYTES = 4 << 30


def tcp(bench: Bench, seed: Worker, fork: Worker) -> dict[str, Measure]:
    """One plain TCP connection, from the seed's tensors into the fork's."""
    port = bench.ask(seed, "limits.tcp_serve")

    def reading(chunk: int) -> Measure:
        return lambda: bench.ask(fork, "limits.tcp_read", port=port, chunk=chunk)

    return {name: reading(chunk) for name, chunk in READS.items()}


def memcpy(bench: Bench, worker: Worker) -> dict[str, Measure]:
    """A copy within the host's memory, by one core."""
    return {MEMCPY: lambda: bench.ask(worker, "limits.memcpy")}


def buffer_bytes(bench: Bench) -> int:
    """Bytes of the buffers that are copied between GPUs."""
    return max(1 << 20, int(BUFFER_BYTES * min(1.0, bench.scale)))


def raw(bench: Bench) -> dict[str, Measure]:
    """A copy from the seed's GPU to the fork's, within one process."""
    worker = bench.start("raw", bench.sink)
    bench.ask(worker, "limits.buffers", timeout=START_TIMEOUT, nbytes=buffer_bytes(bench), source=bench.source)
    return {RAW: lambda: bench.ask(worker, "limits.copy")}


def send(bench: Bench, outcome: Outcome) -> dict[str, Measure]:
    """One NCCL message, in a group that has been used before."""
    if bench.source == bench.sink:
        outcome.skipped[SEND] = "NCCL refuses two ranks on one GPU"
        return {}
    pair = [bench.start(f"nccl{rank}", device) for rank, device in enumerate((bench.source, bench.sink))]
    bench.ask_all(pair, "limits.buffers", timeout=START_TIMEOUT, nbytes=buffer_bytes(bench))
    join(bench, pair)
    return {SEND: lambda: bench.ask_all(pair, "limits.nccl_send")[1]}


def joins(bench: Bench, count: int) -> list[float]:
    """Make a group of two fresh processes `count` times; the seconds of each."""
    pairs = [
        [bench.start(f"join{i}-{rank}", device, own_gpu=True) for rank, device in enumerate((bench.source, bench.sink))]
        for i in range(count)
    ]
    bench.ask_all([worker for pair in pairs for worker in pair], "api.warm_up", timeout=START_TIMEOUT)
    seconds = []
    for pair in pairs:
        seconds.append(join(bench, pair))
        for worker in pair:
            worker.close()
    return seconds


def join(bench: Bench, pair: Sequence[Worker]) -> float:
    """Make an NCCL group of the two workers; the seconds it takes."""
    return float(max(bench.ask_all(pair, "limits.nccl_join", names=[worker.name for worker in pair], port=free_port())))


def ipc(bench: Bench) -> dict[str, Measure]:
    """A copy between two processes, over a CUDA IPC handle that is open already."""
    source, sink = bench.start("ipc source", bench.source), bench.start("ipc sink", bench.sink)
    bench.ask_all((source, sink), "limits.buffers", timeout=START_TIMEOUT, nbytes=buffer_bytes(bench))
    bench.ask(sink, "limits.ipc_open", offer=bench.ask(source, "limits.ipc_offer"))
    return {IPC: lambda: bench.ask(sink, "limits.ipc_copy")}


def mooncake_tcp(bench: Bench, outcome: Outcome, shape: str = "1GiB/1") -> dict[str, Measure]:
    """Mooncake's TCP: one tensor, between the seed's device and the fork's."""
    try:
        read = mooncake_engines(bench, shape, nvlink=False)
    except (Skipped, Failed, Lost) as error:
        outcome.skipped[TCP] = str(error)
        return {}
    return {TCP: read}


def mooncake_engines(bench: Bench, shape: str, *, nvlink: bool) -> Measure:
    """Start two engines with a model of this shape each; the measure reads one model into the other."""
    source, sink = bench.start("engine source", bench.source), bench.start("engine sink", bench.sink)
    bench.ask_all((source, sink), "api.warm_up", timeout=START_TIMEOUT)
    for worker in (source, sink):
        bench.ask(worker, "models.build", shape=bench.shape(shape), placement="placed", fill=worker is source)
    opened = bench.ask(source, "baselines.start_engine", nvlink=nvlink)
    bench.ask(sink, "baselines.start_engine", nvlink=nvlink)
    bench.ask(sink, "baselines.engine_read", **opened)
    if bench.ask(source, "models.sums") != bench.ask(sink, "models.sums"):
        raise Failed("Mooncake reported success, and other bytes arrived")
    return lambda: bench.ask(sink, "baselines.engine_read", **opened)


def cpu_case(bench: Bench, outcome: Outcome) -> None:
    """The speeds of the host: memcpy by one core, and one TCP connection."""
    seed, fork = bench.start("source", "cpu"), bench.start("sink", "cpu")
    bench.ask_all(
        (seed, fork), "models.build", timeout=START_TIMEOUT, shape=bench.shape("1GiB/1"), placement="placed", fill=True
    )
    _report(bench, outcome, memcpy(bench, fork) | tcp(bench, seed, fork))


def gpu_case(bench: Bench, outcome: Outcome) -> None:
    """The speeds of the GPUs and of their links."""
    measures = raw(bench) | ipc(bench)
    host = bench.start("host", bench.sink)
    bench.ask(host, "limits.buffers", timeout=START_TIMEOUT, nbytes=buffer_bytes(bench) // 4)

    def between(into_gpu: bool) -> Measure:
        return lambda: bench.ask(host, "limits.pinned", into_gpu=into_gpu, nbytes=buffer_bytes(bench) // 4)

    measures |= {"pinned host to GPU": between(True), "GPU to pinned host": between(False)}
    measures |= send(bench, outcome)
    outcome.detail["samples"] = _report(bench, outcome, measures, against=RAW)


def baselines_case(bench: Bench, outcome: Outcome, *, shape: str) -> None:
    """One model as users would copy it without tensorfork: from a file, by NCCL broadcasts, by Mooncake's engine."""
    measures = raw(bench)
    pair = [bench.start(name, device) for name, device in (("source", bench.source), ("sink", bench.sink))]
    bench.ask_all(pair, "api.warm_up", timeout=START_TIMEOUT)
    built = bench.ask_all(pair, "models.build", shape=bench.shape(shape), placement="placed", fill=True)[0]
    try:
        path = f"{bench.folder(int(1.05 * built['nbytes']))}/model.safetensors"
        bench.ask(pair[1], "baselines.save_safetensors", path=path)
        measures["safetensors from memory"] = lambda: bench.ask(pair[1], "baselines.load_safetensors", path=path)
    except (Skipped, Failed) as error:
        outcome.skipped["safetensors from memory"] = str(error)
    name = "NCCL, a broadcast a parameter"
    if bench.source == bench.sink:
        outcome.skipped[name] = "NCCL refuses two ranks on one GPU"
    else:
        outcome.detail["nccl_join_seconds"] = join(bench, pair)
        measures[name] = lambda: bench.ask_all(pair, "limits.nccl_broadcast")[1]
    try:
        measures["Mooncake NVLink, a read a tensor"] = mooncake_engines(bench, shape, nvlink=True)
    except (Skipped, Failed, Lost) as error:
        outcome.skipped["Mooncake NVLink, a read a tensor"] = str(error)
    measures |= mooncake_tcp(bench, outcome)
    _report(bench, outcome, measures, against=RAW)


def _report(
    bench: Bench, outcome: Outcome, measures: dict[str, Measure], against: str | None = None
) -> dict[str, list[Any]]:
    """Add each measure's speed, with its ratio to the measure `against`; the samples."""
    values = interleave(measures, bench.rounds, outcome)
    for name, samples in values.items():
        if name == against or against is None or not values[against]:
            outcome.add(name, samples, "GB/s")
        else:
            outcome.add(name, samples, "GB/s", limit=against, against=values[against])
    return values


def seconds_of(nbytes: int, speeds: list[float]) -> list[float]:
    """The seconds that so many bytes take at the median of these speeds (GB/s), as one sample."""
    return [nbytes / statistics.median(speeds) / 1e9] if speeds else []
