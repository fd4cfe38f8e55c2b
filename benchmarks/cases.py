"""The table of cases."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import disturbance, fork, limits, small
from benchmarks.bench import Bench
from benchmarks.measure import Outcome

Run = Callable[[Bench, Outcome], None]
NVLINK = {("arena", "arena"): 0.98, ("placed", "arena"): 0.95}
TRANSPORTS: dict[str, dict[str, Any]] = {
    "cuda_ipc": {"goals": NVLINK},
    "transfer_engine:nvlink": {"goals": NVLINK},
    "nccl": {"goals": {("placed", "arena"): 0.95, ("placed", "placed"): 0.95}, "limit": limits.SEND},
    "zeromq": {"goals": {("placed", "arena"): 3.0, ("arena", "arena"): 3.0}, "limit": limits.TCP},
}
EXPERTS = {"cuda_ipc": 0.90, "transfer_engine:nvlink": 0.90, "nccl": 0.80}
GENTLE = (
    "cuda_ipc,rate_limit=100e9",
    "cuda_ipc,rate_limit=25e9",
    "transfer_engine:nvlink,rate_limit=100e9",
    "transfer_engine:nvlink,rate_limit=25e9",
    *(f"nccl,max_ctas={count}" for count in (1, 2, 4, 8, 16)),
    "nccl,rate_limit=25e9",
    "zeromq,rate_limit=1e9",
)


@dataclass(frozen=True)
class Case:
    """One case: its name, the groups it is in, the GPUs it needs, and what it does."""

    name: str
    groups: frozenset[str]
    run: Run
    gpus: int = 0
    scale: float = 1.0

    @property
    def about(self) -> str:
        """In a line."""
        what = self.run.func if isinstance(self.run, partial) else self.run
        return (what.__doc__ or "").partition("\n")[0]


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    return [*_on_cpus(), *_on_gpus(), *_disturbances()]


def select(wanted: Sequence[str]) -> list[Case]:
    """The cases that are named, by name, pattern or group; raises `ValueError` for a word that names none."""
    found: dict[str, Case] = {}
    for word in wanted:
        named = [case for case in cases() if word in case.groups or fnmatchcase(case.name, word)]
        if not named:
            raise ValueError(f"{word!r} names no case and no group; `python -m benchmarks list` shows them")
        found |= {case.name: case for case in named}
    return list(found.values())


def _on_cpus() -> Iterator[Case]:
    cpu, both = frozenset({"cpu"}), frozenset({"cpu", "sizes"})
    yield Case("cpu-limits", cpu, limits.cpu_case)
    sizes = {"1MiB": 10, "16MiB": 10, "256MiB": 100, "1GiB": 300, "4GiB": 300}
    for size, count in sizes.items():
        goal, cold = (1.0, 2) if size == "1GiB" else (None, 0)
        yield Case(f"cpu-{size}", both, partial(fork.cpu_case, shape=f"{size}/{count}", goal=goal, cold=cold))
    for shape, goal in (("10x25MiB", None), ("300x1MiB", None), ("3000x64KiB", 0.8), ("20000x16KiB", None)):
        yield Case(f"cpu-{shape}", both, partial(fork.cpu_case, shape=shape, goal=goal))
    for transport, goal in (("gloo", None), ("transfer_engine:tcp", 0.65)):
        run = partial(fork.cpu_case, shape="1GiB/300", transport=transport, goal=goal)
        yield Case(f"cpu-1GiB-{transport}", cpu | {"transports"}, run)
    for shape in ("300x4KiB", "20000x4KiB"):
        yield Case(f"cpu-publish-{shape}", cpu | {"publish"}, partial(small.publish_case, shape=shape))
    yield Case("cpu-digest", cpu, partial(small.digest_case, shape="256MiB/300", goal=small.DIGEST_CPU))
    quick = frozenset({"quick"})
    yield Case("quick-cpu", quick, partial(fork.cpu_case, shape="64MiB/100"))
    yield Case("quick-publish", quick, partial(small.publish_case, shape="300x4KiB"))


def _on_gpus() -> Iterator[Case]:
    gpu, quick = frozenset({"gpu"}), frozenset({"quick"})
    yield Case("gpu-limits", gpu | {"gpu-first"}, limits.gpu_case, gpus=1)
    for transport, how in TRANSPORTS.items():
        yield Case(
            f"quick-gpu-{transport}",
            quick,
            partial(
                fork.gpu_case, shape="llama", transport=transport, into=("arena",), limit=how.get("limit", limits.RAW)
            ),
            gpus=1,
            scale=1 / 16,
        )
    for transport, how in TRANSPORTS.items():
        first = gpu | {"gpu-first", "gpu-forks"}
        yield Case(
            f"gpu-llama-{transport}", first, partial(fork.gpu_case, shape="llama", transport=transport, **how), 1
        )
    for transport, how in TRANSPORTS.items():
        experts = EXPERTS.get(transport)
        goals = {("placed", "placed"): experts} if experts else how["goals"]
        run = partial(fork.gpu_case, shape="experts", transport=transport, **how | {"goals": goals})
        yield Case(f"gpu-experts-{transport}", gpu | {"gpu-forks"}, run, 1)
    yield Case("gpu-digest-llama", gpu | {"gpu-first"}, partial(small.digest_case, shape="llama", goal=0.45), 1)
    yield Case("gpu-digest-experts", gpu | {"gpu-first"}, partial(small.digest_case, shape="experts", goal=0.30), 1)
    for shape in ("llama", "experts"):
        yield Case(f"gpu-peers-{shape}", gpu | {"gpu-peers"}, partial(limits.peers_case, shape=shape), 1)
    for transport, how in TRANSPORTS.items():
        for name, shape in (("llama-arena", "llama"), ("one", "16GB/1")):
            run = partial(fork.gpu_case, shape=shape, transport=transport, seed="arena", into=("arena",), **how)
            yield Case(f"gpu-{name}-{transport}", gpu | {"gpu-forks"}, run, 1)
    for transport in ("cuda_ipc", "transfer_engine:nvlink"):
        run = partial(fork.gpu_case, shape="60GB/1", transport=transport, seed="arena", into=("arena",), goals=NVLINK)
        yield Case(f"gpu-60GB-{transport}", frozenset({"gpu-large"}), run, 2)


def _disturbances() -> Iterator[Case]:
    cpu = frozenset({"cpu", "disturbance"})
    for transport in ("zeromq", "gloo", "transfer_engine:tcp"):
        run = partial(disturbance.case, load="loop", shape="256MiB/100", transport=transport)
        yield Case(f"cpu-disturbance-{transport}", cpu, run)
    gpu = frozenset({"gpu", "gpu-disturbance"})
    for transport in (*TRANSPORTS, *GENTLE):
        run = partial(disturbance.case, load="gemm", shape="llama", transport=transport)
        yield Case(f"gpu-disturbance-{transport}", gpu, run, 1)
    for transport in TRANSPORTS:
        run = partial(disturbance.case, load="llama", shape=None, transport=transport)
        yield Case(f"gpu-generating-{transport}", gpu, run, 1)
