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
NVLINK = {("arena", "arena"): 0.98, ("placed", "arena"): 0.95, ("placed", "placed"): 0.95}
TRANSPORTS: dict[str, dict[str, Any]] = {
    "cuda_ipc": {"goals": NVLINK},
    "transfer_engine:nvlink": {"goals": NVLINK},
    "nccl": {"goals": {("placed", "arena"): 0.95, ("placed", "placed"): 0.95}, "limit": limits.SEND},
    "zeromq": {"goals": {("placed", "arena"): 3.0}, "into": ("arena",), "limit": limits.TCP},
}
SLOW = "zeromq"
"""A quarter of the model is enough to measure it by."""
EXPERTS = {"cuda_ipc": 0.90, "transfer_engine:nvlink": 0.90, "nccl": 0.80}
GENTLE = (
    "cuda_ipc,rate_limit=100e9",
    "cuda_ipc,rate_limit=50e9",
    "cuda_ipc,rate_limit=25e9",
    "transfer_engine:nvlink,rate_limit=100e9",
    "transfer_engine:nvlink,rate_limit=50e9",
    "transfer_engine:nvlink,rate_limit=25e9",
    *(f"nccl,max_ctas={count}" for count in (1, 2, 4, 8, 16)),
    "nccl,rate_limit=25e9",
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
    gpu, forks = frozenset({"gpu"}), frozenset({"gpu", "gpu-forks"})
    yield Case("gpu-limits", gpu | {"gpu-first"}, limits.gpu_case, 1)
    for transport, how in TRANSPORTS.items():
        run = partial(fork.gpu_case, shape="llama", transport=transport, **how | {"into": ("arena",)})
        yield Case(f"quick-gpu-{transport}", frozenset({"quick"}), run, 1, 1 / 16)
    for transport, how in TRANSPORTS.items():
        run = partial(fork.gpu_case, shape=_size("llama", transport), transport=transport, **how)
        yield Case(f"gpu-llama-{transport}", forks | {"gpu-first"}, run, 1)
    for shape, goal in (("llama", 0.45), ("experts", 0.30)):
        run = partial(small.digest_case, shape=shape, goal=goal)
        yield Case(f"gpu-digest-{shape}", gpu | {"gpu-first"}, run, 1)
    for transport, how in TRANSPORTS.items():
        goals = {("placed", "placed"): EXPERTS[transport]} if transport in EXPERTS else {}
        run = partial(fork.gpu_case, shape=_size("experts", transport), transport=transport, **how | {"goals": goals})
        yield Case(f"gpu-experts-{transport}", forks | {"gpu-experts"}, run, 1)
    for shape in ("llama", "experts"):
        yield Case(f"gpu-peers-{shape}", gpu | {"gpu-peers"}, partial(limits.peers_case, shape=shape), 1)
    for transport in ("cuda_ipc", "transfer_engine:nvlink", "nccl"):
        how = TRANSPORTS[transport] | {"seed": "arena", "into": ("arena",), "transport": transport}
        for name, shape in (("llama-arena", "llama"), ("experts-arena", "experts"), ("one", "16GB/1")):
            yield Case(f"gpu-{name}-{transport}", forks | {"gpu-arena"}, partial(fork.gpu_case, shape=shape, **how), 1)
        run = partial(fork.gpu_case, shape="60GB/1", **how)
        yield Case(f"gpu-60GB-{transport}", frozenset({"gpu-large"}), run, 2)


def _size(shape: str, transport: str) -> str:
    return f"{shape}*0.25" if transport == SLOW else shape


def _disturbances() -> Iterator[Case]:
    cpu = frozenset({"cpu", "disturbance"})
    for transport in ("zeromq", "gloo", "transfer_engine:tcp"):
        run = partial(disturbance.case, load="loop", shape="256MiB/100", transport=transport)
        yield Case(f"cpu-disturbance-{transport}", cpu, run)
    for transport in (*TRANSPORTS, *GENTLE):
        run = partial(disturbance.case, load="gemm", shape="llama", transport=transport)
        group = "gpu-gentle" if transport in GENTLE else "gpu-disturbance"
        yield Case(f"gpu-disturbance-{transport}", frozenset({"gpu", group}), run, 1)
    for transport in TRANSPORTS:
        run = partial(disturbance.case, load="llama", shape=None, transport=transport)
        yield Case(f"gpu-generating-{transport}", frozenset({"gpu", "gpu-generating"}), run, 1)
