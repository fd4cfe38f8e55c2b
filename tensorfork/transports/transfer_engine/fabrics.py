"""Which fabric two processes can use: the facts that each side sends, and the choice, which is pure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.environment import forbidden_changes
from tensorfork.interpreter.process import host_and_network_id, process_token
from tensorfork.memory.allocations import Allocation, why_not_exportable
from tensorfork.regions import Region
from tensorfork.transports.base import Facts
from tensorfork.transports.transfer_engine import library

INFINIBAND = Path("/sys/class/infiniband")
"""Where Linux lists RDMA NICs."""


def facts(
    regions: Sequence[Region], allocations: Sequence[Allocation], fabrics: Sequence[str], nics: Sequence[str]
) -> Facts:
    """What this side can do with these regions. `allocations` are those that the GPU regions lie in.

    Raises `TransportUnavailable` where Mooncake is not installed as it should be.
    """
    wheel = library.installed_wheel()
    devices = sorted({region.device for region in regions})
    found: dict[str, Any] = {
        "wheel": str(wheel),
        "cuda": wheel.cuda,
        "fabrics": list(fabrics),
        "host": host_and_network_id(),
        "process": process_token(),
        "devices": devices,
        "nics": [name for name in rdma_nics() if not nics or name in nics],
        "closed": why_not_exportable(allocations),
    }
    if forbidden := {one: why for one in fabrics if (why := forbidden_changes(library.needed_environment(one)))}:
        found["forbidden"] = forbidden
    return found


def rdma_nics() -> list[str]:
    """The names of this host's RDMA NICs."""
    try:
        return sorted(path.name for path in INFINIBAND.iterdir())
    except OSError:
        return []


def choose(fork: Facts, seed: Facts) -> str:
    """The first fabric of the fork's list that both sides can use.

    Raises `TransportUnavailable`, with the reason against each fabric of the list, where there is none.
    """
    reasons = []
    for fabric in [str(one) for one in fork.get("fabrics", [])]:
        why_not = _not_offered(fabric) if fabric not in seed.get("fabrics", []) else _why_not(fabric, fork, seed)
        if why_not is None:
            return fabric
        reasons.append(f"{fabric}: {why_not}")
    raise TransportUnavailable("; ".join(reasons) or "no fabric was asked for")


def _not_offered(fabric: str) -> str:
    remedy = f"the seed does not offer it; publish there with transports=['transfer_engine:{fabric}']"
    return f"{remedy}, and mind that nothing protects the ports it opens" if fabric == "tcp" else remedy


def _why_not(fabric: str, fork: Facts, seed: Facts) -> str | None:
    for side, facts in (("fork", fork), ("seed", seed)):
        if fabric in facts.get("forbidden", {}):
            return f"on the {side}'s side {facts['forbidden'][fabric]}"
    return _WHY_NOT[fabric](fork, seed)


def _why_not_nvlink(fork: Facts, seed: Facts) -> str | None:
    for side, facts in (("fork", fork), ("seed", seed)):
        if not facts.get("cuda"):
            return f"the {side}'s {facts.get('wheel')} was built without CUDA"
        if not facts.get("devices") or "cpu" in facts["devices"]:
            return f"it carries the memory of GPUs alone, and some of the {side}'s is on the CPU; cuda_ipc takes both"
    if fork.get("host") is None or fork.get("host") != seed.get("host"):
        return "the two are not on one host, with one network"
    if fork.get("process") == seed.get("process"):
        return "both are one process, which cannot open its own memory; cuda_ipc takes that"
    not_exportable = seed.get("closed")
    return None if not_exportable is None else str(not_exportable)


def _why_not_rdma(fork: Facts, seed: Facts) -> str | None:
    for side, facts in (("fork", fork), ("seed", seed)):
        if not facts.get("nics"):
            return f"the {side} has no RDMA NIC"
    return _wheel_without_gpus(fork, seed)


def _wheel_without_gpus(fork: Facts, seed: Facts) -> str | None:
    for side, facts in (("fork", fork), ("seed", seed)):
        gpus = [device for device in facts.get("devices", []) if device != "cpu"]
        if gpus and not facts.get("cuda"):
            return f"the {side}'s tensors are on {gpus[0]}, and its {facts.get('wheel')} was built without CUDA"
    return None


_WHY_NOT = {"nvlink": _why_not_nvlink, "rdma": _why_not_rdma, "tcp": _wheel_without_gpus}
