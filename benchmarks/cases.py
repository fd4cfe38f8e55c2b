"""The table of cases."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from benchmarks import changes, digest, disturbance, fork, imports, limits, load, publish, ready, settings
from benchmarks.bench import Bench
from benchmarks.measure import Outcome

Run = Callable[[Bench, Outcome], None]
NVLINK_GOALS = {("arena", "arena"): 0.98, ("placed", "arena"): 0.95, ("placed", "placed"): 0.95}
TRANSPORTS: dict[str, dict[str, Any]] = {
    "cuda_ipc": {"goals": NVLINK_GOALS},
    "transfer_engine:nvlink": {"goals": NVLINK_GOALS},
    "nccl": {"goals": {("placed", "arena"): 0.95, ("placed", "placed"): 0.95}, "limit": limits.SEND},
    "zeromq": {"goals": {("placed", "arena"): 3.0}, "into": ("arena",), "limit": limits.TCP},
}
REAL_MODELS = ("transformers-llama", "transformers-mixtral")
REAL_COLD_GOALS = {False: 2.5, True: 2.5}
SLOW = "zeromq"
"""Measured with a quarter of the model."""
EXPERTS_GOALS = {"cuda_ipc": 0.90, "transfer_engine:nvlink": 0.90, "nccl": 0.80}
GENTLE_SETTINGS = (
    "cuda_ipc,rate_limit=100e9",
    "cuda_ipc,rate_limit=50e9",
    "cuda_ipc,rate_limit=25e9",
    "transfer_engine:nvlink,rate_limit=100e9",
    "transfer_engine:nvlink,rate_limit=50e9",
    "transfer_engine:nvlink,rate_limit=25e9",
    *(f"nccl,max_ctas={count}" for count in (1, 2, 4, 8, 16)),
    "nccl,rate_limit=25e9",
)
SEED_LIMITS = {
    "cuda_ipc": ("100e9", "50e9"),
    "transfer_engine:nvlink": ("100e9", "50e9"),
    "nccl,max_ctas=4": ("50e9", "25e9"),
    "nccl": ("25e9",),
    "zeromq": ("2e9",),
}
"""Bytes a second of a seed, for all its forks."""
LOAD_MODEL = "64MiB/100"
CPU_SEED_LIMITS = {"zeromq": "200e6", "gloo": "200e6"}


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: its name, which the command line and the results use.
        groups: other words that select it.
        run: what it does.
        gpus: how many GPUs it needs.
        scale: factor for the size of its models, beside that of the run.
        rounds: interleaved rounds, where the command line does not say.
    """

    name: str
    groups: frozenset[str]
    run: Run
    gpus: int = 0
    scale: float = 1.0
    rounds: int = 5

    @property
    def about(self) -> str:
        """What it does, in a line."""
        function = self.run.func if isinstance(self.run, partial) else self.run
        return (function.__doc__ or "").partition("\n")[0]


def cases() -> list[Case]:
    """All cases, in the order in which they run."""
    return [*_on_cpus(), *_on_gpus(), *_disturbances(), *_process_settings(), *_load()]


def select(words: Sequence[str]) -> list[Case]:
    """The cases with these names, patterns or groups; raises `ValueError` for a word that selects none."""
    selected: dict[str, Case] = {}
    for word in words:
        named = [case for case in cases() if word in case.groups or fnmatchcase(case.name, word)]
        if not named:
            raise ValueError(f"{word!r} names no case and no group; `python -m benchmarks list` shows them")
        selected |= {case.name: case for case in named}
    return list(selected.values())


def _on_cpus() -> Iterator[Case]:
    cpu, both = frozenset({"cpu"}), frozenset({"cpu", "sizes"})
    yield Case("cpu-limits", cpu, limits.cpu_case)
    sizes = {"1MiB": 10, "16MiB": 10, "256MiB": 100, "1GiB": 300, "4GiB": 300}
    for size, count in sizes.items():
        goals: dict[str, Any] = {"goal": 0.7, "stable_goal": 1.0, "cold": 2} if size == "1GiB" else {}
        yield Case(f"cpu-{size}", both, partial(fork.cpu_case, shape=f"{size}/{count}", **goals))
    for shape in ("10x25MiB", "300x1MiB", "3000x64KiB", "20000x16KiB"):
        goals = {"goal": 0.7, "stable_goal": 0.8} if shape == "3000x64KiB" else {}
        yield Case(f"cpu-{shape}", both, partial(fork.cpu_case, shape=shape, **goals))
    for transport, goal in (("gloo", None), ("transfer_engine:tcp", 0.65)):
        run = partial(fork.cpu_case, shape="1GiB/300", transport=transport, goal=goal)
        yield Case(f"cpu-1GiB-{transport}", cpu | {"transports"}, run)
    for shape in ("300x4KiB", "20000x4KiB"):
        yield Case(f"cpu-publish-{shape}", cpu | {"publish"}, partial(publish.case, shape=shape))
        yield Case(f"cpu-changes-{shape}", cpu | {"changes"}, partial(changes.case, shape=shape))
    yield Case("cpu-digest", cpu, partial(digest.case, shape="256MiB/300", goal=digest.CPU_GOAL))
    run = partial(ready.case, shape=f"{REAL_MODELS[0]}*0.03", transport="zeromq")
    yield Case("cpu-ready", frozenset({"ready"}), run, rounds=3)
    yield Case("import", cpu, imports.case, rounds=7)
    quick = frozenset({"quick"})
    yield Case("quick-cpu", quick, partial(fork.cpu_case, shape="64MiB/100"))
    yield Case("quick-publish", quick, partial(publish.case, shape="300x4KiB"))


def _on_gpus() -> Iterator[Case]:
    gpu, forks = frozenset({"gpu"}), frozenset({"gpu", "gpu-forks"})
    yield Case("gpu-limits", gpu | {"gpu-first"}, limits.gpu_case, 1)
    for transport, options in TRANSPORTS.items():
        run = partial(fork.gpu_case, shape="llama", transport=transport, **options | {"into": ("arena",)})
        yield Case(f"quick-gpu-{transport}", frozenset({"quick"}), run, 1, 1 / 16)
    for transport, options in TRANSPORTS.items():
        run = partial(fork.gpu_case, shape=_size("llama", transport), transport=transport, **options)
        yield Case(f"gpu-llama-{transport}", forks | {"gpu-first"}, run, 1)
    for shape, goal in (("llama", 0.45), ("experts", 0.30)):
        run = partial(digest.case, shape=shape, goal=goal)
        yield Case(f"gpu-digest-{shape}", gpu | {"gpu-first"}, run, 1)
    for transport, options in TRANSPORTS.items():
        goals = {("placed", "placed"): EXPERTS_GOALS[transport]} if transport in EXPERTS_GOALS else {}
        run = partial(
            fork.gpu_case, shape=_size("experts", transport), transport=transport, **options | {"goals": goals}
        )
        yield Case(f"gpu-experts-{transport}", forks | {"gpu-experts"}, run, 1)
    for shape in REAL_MODELS:
        for transport in ("cuda_ipc", "transfer_engine:nvlink"):
            options = {"shape": shape, "transport": transport, "into": ("arena",), "cold_goals": REAL_COLD_GOALS}
            yield Case(f"gpu-{shape}-{transport}", gpu | {"gpu-real"}, partial(fork.gpu_case, **options), 1)
    yield Case("gpu-ready", gpu | {"ready"}, partial(ready.case, shape=REAL_MODELS[0], transport="cuda_ipc"), 1)
    for shape in ("llama", "experts"):
        yield Case(f"gpu-changes-{shape}", gpu | {"changes"}, partial(changes.case, shape=shape), 1)
        yield Case(f"gpu-baselines-{shape}", gpu | {"gpu-baselines"}, partial(limits.baselines_case, shape=shape), 1)
    for transport in ("cuda_ipc", "transfer_engine:nvlink", "nccl"):
        options = TRANSPORTS[transport] | {"seed": "arena", "into": ("arena",), "transport": transport}
        for name, shape in (("llama-arena", "llama"), ("experts-arena", "experts"), ("one", "16GB/1")):
            yield Case(
                f"gpu-{name}-{transport}", forks | {"gpu-arena"}, partial(fork.gpu_case, shape=shape, **options), 1
            )
        run = partial(fork.gpu_case, shape="60GB/1", **options)
        yield Case(f"gpu-60GB-{transport}", frozenset({"gpu-large"}), run, 2)


def _size(shape: str, transport: str) -> str:
    return f"{shape}*0.25" if transport == SLOW else shape


def _disturbances() -> Iterator[Case]:
    cpu = frozenset({"cpu", "disturbance"})
    for transport in ("zeromq", "gloo", "transfer_engine:tcp"):
        run = partial(disturbance.case, load="loop", shape="256MiB/100", transport=transport)
        yield Case(f"cpu-disturbance-{transport}", cpu, run)
    for transport in (*TRANSPORTS, *GENTLE_SETTINGS):
        run = partial(disturbance.case, load="gemm", shape="llama", transport=transport)
        group = "gpu-gentle" if transport in GENTLE_SETTINGS else "gpu-disturbance"
        yield Case(f"gpu-disturbance-{transport}", frozenset({"gpu", group}), run, 1)
    yield from _limited_seeds(cpu)
    for transport in TRANSPORTS:
        run = partial(disturbance.case, load="llama", shape=None, transport=transport)
        yield Case(f"gpu-generating-{transport}", frozenset({"gpu", "gpu-generating"}), run, 1)


def _limited_seeds(cpu: frozenset[str]) -> Iterator[Case]:
    """The same, with the seed's own rate limit."""
    for transport, rate in CPU_SEED_LIMITS.items():
        options = {"shape": "256MiB/100", "transport": transport, "rate_limit": float(rate)}
        run = partial(disturbance.case, load="loop", **options)
        yield Case(f"cpu-limited-{transport}-{rate}", cpu | {"limited"}, run)
    for transport, rates in SEED_LIMITS.items():
        for rate in rates:
            options = {"shape": "llama", "transport": transport, "rate_limit": float(rate)}
            run = partial(disturbance.case, load="gemm", **options)
            yield Case(f"gpu-limited-{transport}-{rate}", frozenset({"gpu", "gpu-limited", "limited"}), run, 1)


def _process_settings() -> Iterator[Case]:
    run = partial(settings.case, shape="20000x4KiB", transport="zeromq")
    yield Case("settings", frozenset({"cpu"}), run)
    for shape in ("20000x4KiB", "llama", "experts"):
        run = partial(settings.case, shape=shape, transport="cuda_ipc")
        yield Case(f"gpu-settings-{shape}", frozenset({"gpu", "gpu-settings"}), run, 1)


def _load() -> Iterator[Case]:
    """What a seed bears."""
    for name, run in {
        "forks": partial(load.forks_case, shape=LOAD_MODEL, count=64),
        "idle": partial(load.idle_case, shape=LOAD_MODEL, count=1000),
        "exhausted": partial(load.exhausted_case, shape=LOAD_MODEL, count=345, descriptors=256),
        "unread": partial(load.readers_case, shape=LOAD_MODEL, count=60, trickle=False),
        "trickle": partial(load.readers_case, shape=LOAD_MODEL, count=60, trickle=True),
        "floods": partial(load.floods_case, shape=LOAD_MODEL, peers=8),
    }.items():
        yield Case(f"load-{name}", frozenset({"load"}), run, rounds=3)
