"""The public names, and what comes with `import tensorfork`: no more than is said."""

import inspect
import json
import subprocess
import sys
import types

import pytest

import tensorfork

pytestmark = pytest.mark.slow

CLEAN = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning", "-I", "-c"]


def run(program: str) -> dict[str, object]:
    """What a fresh process says, as JSON, on its last line."""
    done = subprocess.run([sys.executable, *CLEAN, program], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_what_can_be_reached_is_what_is_listed() -> None:
    reached = {
        name
        for name, value in vars(tensorfork).items()
        if not isinstance(value, types.ModuleType) and not name.startswith("_")
    }
    assert reached | {"__version__"} == set(tensorfork.__all__)
    assert sorted(tensorfork.__all__) == list(tensorfork.__all__)


def test_every_public_name_says_what_it_is() -> None:
    for name in tensorfork.__all__:
        value = getattr(tensorfork, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            for member, held in vars(value).items():
                if inspect.isfunction(held) and not member.startswith("_"):
                    assert held.__doc__, f"{name}.{member}"


def test_options_go_by_their_names() -> None:
    for function, first in ((tensorfork.publish, 1), (tensorfork.fork_into, 2), (tensorfork.fork, 1)):
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        assert kinds[:first] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * first
        assert set(kinds[first:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_importing_it_starts_nothing_changes_nothing_and_brings_only_what_it_needs() -> None:
    said = run("""
import json, logging, os, signal, sys, threading, warnings
import torch

def state():
    return {
        "environment": dict(os.environ),
        "tasks": len(os.listdir("/proc/self/task")),
        "threads": [thread.name for thread in threading.enumerate()],
        "files": len(os.listdir("/proc/self/fd")),
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "filters": [str(one) for one in warnings.filters],
        "handlers": [str(one) for one in logging.getLogger().handlers + logging.getLogger("tensorfork").handlers],
        "cuda": torch.cuda.is_initialized(),
        "threads of torch": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist()[:16],
        "dtype": str(torch.get_default_dtype()),
    }

before, known = state(), set(sys.modules)
import tensorfork
after = state()
ours = {"tensorfork", "attr", "attrs", "msgpack", "zmq", "cython_runtime", "typing_extensions"}
new = {name.partition(".")[0] for name in set(sys.modules) - known} - ours - set(sys.stdlib_module_names)
strange = [name for name in new if not name.startswith("_")]
transports = [name for name in sys.modules if name.startswith("tensorfork.transports.")]
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "strange": strange, "transports": sorted(transports)}))
""")
    assert said["changed"] == []
    assert said["strange"] == []
    assert said["transports"] == [f"tensorfork.transports.{name}" for name in ("base", "rate_limit", "registry")]


def test_a_whole_fork_needs_the_base_install_alone_and_not_numpy() -> None:
    said = run("""
import json, sys

for name in (
    "numpy", "typer", "rich", "transformers", "safetensors", "mooncake", "etcd3gw", "modelexpress", "vllm", "sglang",
    "psutil", "pytest", "hypothesis", "triton", "cupy",
):
    sys.modules[name] = None  # importing it is an error, as it is where it is not installed
import torch
import tensorfork

comb = torch.arange(60_000, dtype=torch.int16).view(3000, 20)
model = {
    "dense": torch.randn(1000), "tied": None, "comb": comb[:, ::3], "odd": torch.arange(99, dtype=torch.uint8)[1:],
    "half": torch.ones(3, 5, dtype=torch.bfloat16).t(), "empty": torch.empty(0, 3), "yes": torch.tensor(True),
}
model["tied"] = model["dense"]
other = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for name, t in model.items()}
other["tied"] = other["dense"]
with tensorfork.publish(model) as seed:
    copy = tensorfork.fork(seed.address, timeout=60)
    report = tensorfork.fork_into(other, seed.address, timeout=60)
    again = tensorfork.fork_into(copy, seed.address, timeout=60)
    with seed.updating():
        model["dense"].zero_()
    changed = tensorfork.fork(seed.address, timeout=60)
equal = all(torch.equal(copy[name], model[name]) for name in model if name not in ("dense", "tied"))
equal = equal and all(torch.equal(changed[name], model[name]) for name in model)
equal = equal and torch.equal(other["dense"], copy["dense"]) and sys.modules["numpy"] is None
print(json.dumps({"equal": equal, "verified": report.verified and again.verified}))
""")
    assert said == {"equal": True, "verified": True}
