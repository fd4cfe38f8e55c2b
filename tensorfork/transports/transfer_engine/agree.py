"""Which fabric two processes can use: what each says of itself, and the choice, which is pure."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from tensorfork.blocks import Block, why_not_exportable
from tensorfork.errors import TransportUnavailable
from tensorfork.transports.base import Facts, Region
from tensorfork.transports.transfer_engine import library

INFINIBAND = Path("/sys/class/infiniband")
"""Where Linux lists RDMA NICs."""

_this_process = secrets.token_bytes(8)


def facts(regions: Sequence[Region], blocks: Sequence[Block], fabrics: Sequence[str], nics: Sequence[str]) -> Facts:
    """What this side can do with regions, and the blocks that those of GPUs lie in.

    Raises `TransportUnavailable` where Mooncake is not installed as it should be.
    """
    wheel = library.wheel()
    devices = sorted({region.device for region in regions})
    return {
        "wheel": str(wheel),
        "cuda": wheel.cuda,
        "fabrics": list(fabrics),
        "host": host(),
        "process": _this_process + os.getpid().to_bytes(8, "little"),
        "devices": devices,
        "nics": [name for name in found_nics() if not nics or name in nics],
        "closed": why_not_exportable(blocks),
    }


def host() -> str | None:
    """Identifies the host's kernel and the network that this process sees; None where that cannot be told."""
    try:
        network = Path("/proc/self/ns/net").readlink()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {network}"
    except OSError:
        return None


def found_nics() -> list[str]:
    """The names of this host's RDMA NICs."""
    try:
        return sorted(path.name for path in INFINIBAND.iterdir())
    except OSError:
        return []


def choose(fork: Facts, seed: Facts) -> str:
    """The fabric for these two. Raises `TransportUnavailable` with what speaks against each that was asked for."""
    asked = [str(fabric) for fabric in fork.get("fabrics", [])]
    reasons = []
    for fabric in asked:
        why_not = _not_offered(fabric) if fabric not in seed.get("fabrics", []) else _WHY_NOT[fabric](fork, seed)
        if why_not is None:
            return fabric
        reasons.append(f"{fabric}: {why_not}")
    raise TransportUnavailable("; ".join(reasons) or "no fabric was asked for")


def _not_offered(fabric: str) -> str:
    return (
        f"the seed does not offer it; publish there with transports=['transfer_engine:{fabric}'], and mind that "
        "nothing protects the ports it opens"
        if fabric == "tcp"
        else f"the seed does not offer it; publish there with transports=['transfer_engine:{fabric}']"
    )


def _not_nvlink(fork: Facts, seed: Facts) -> str | None:
    for side, said in (("fork", fork), ("seed", seed)):
        if not said.get("cuda"):
            return f"the {side}'s {said.get('wheel')} was built without CUDA"
        if not said.get("devices") or "cpu" in said["devices"]:
            return f"it carries the memory of GPUs alone, and some of the {side}'s is on the CPU; cuda_ipc takes both"
    if fork.get("host") is None or fork.get("host") != seed.get("host"):
        return "the two are not on one host, with one network"
    if fork.get("process") == seed.get("process"):
        return "both are one process, which cannot open its own memory; cuda_ipc takes that"
    closed = seed.get("closed")
    return None if closed is None else str(closed)


def _not_rdma(fork: Facts, seed: Facts) -> str | None:
    for side, said in (("fork", fork), ("seed", seed)):
        if not said.get("nics"):
            return f"the {side} has no RDMA NIC"
    return _not_on_gpus(fork, seed)


def _not_on_gpus(fork: Facts, seed: Facts) -> str | None:
    for side, said in (("fork", fork), ("seed", seed)):
        gpus = [device for device in said.get("devices", []) if device != "cpu"]
        if gpus and not said.get("cuda"):
            return f"the {side}'s tensors are on {gpus[0]}, and its {said.get('wheel')} was built without CUDA"
    return None


_WHY_NOT = {"nvlink": _not_nvlink, "rdma": _not_rdma, "tcp": _not_on_gpus}
