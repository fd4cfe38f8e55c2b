"""Transports through torch's process groups: `NCCL` between GPUs and `Gloo` between CPUs, with the same code.

A transfer is two-sided: the fork sends the list of what it wants over the lease's channel, and a thread of the seed
sends the bytes. Small copies are packed on one side and unpacked on the other. Each lease creates groups of its own, of
two processes, on a store of its own; the engine's groups are not touched. What travels is neither encrypted nor
authenticated. docs/nccl.md says which ports are opened, what is set in the environment, and what ends when.
"""

import math
import socket
from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import evolve

from tensorfork.errors import TransportUnavailable
from tensorfork.interpreter.environment import forbidden_changes
from tensorfork.interpreter.process import process_token
from tensorfork.memory import cuda
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.transports.base import Channel, Facts, Site, Transport
from tensorfork.transports.process_group.export import GroupExport
from tensorfork.transports.process_group.gloo import gloo_environment
from tensorfork.transports.process_group.nccl import ENVIRONMENT
from tensorfork.transports.process_group.pair_group import CtaLimits, Settings
from tensorfork.transports.process_group.region_tensors import merge_adjacent
from tensorfork.transports.process_group.session import GroupSession
from tensorfork.transports.rate_limit import limited_piece
from tensorfork.transports.rate_limit import rate_limit as checked

__all__ = ["NCCL", "Gloo"]


class _GroupTransport(Transport):
    """What both transports have in common. See `NCCL` and `Gloo` for the arguments."""

    rate_limited_by = "seed"

    def __init__(
        self,
        settings: Settings,
        *,
        ports: range | None,
        rate_limit: float | None,
        joining: float,
        stall: float,
    ) -> None:
        if not 0 < settings.small <= settings.bucket or settings.batch < 1:
            raise ValueError("sizes are in bytes, at least 1; small must be no more than bucket")
        self._ports, self._rate_limit, self._joining, self._stall = ports, checked(rate_limit), joining, stall
        self._settings = _limited(settings, self._rate_limit)
        self.piece = self._settings.batch

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """See `Transport.cover`. Regions that touch are merged."""
        return merge_adjacent(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> GroupExport:
        """See `Transport.export`."""
        return GroupExport(
            _limited(self._settings, site.limiter.rate),
            regions,
            site,
            ports=self._ports,
            rate_limit=self._rate_limit,
            joining=self._joining,
            stall=self._stall,
            deadline=deadline,
        )

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> GroupSession:
        """See `Transport.open`."""
        return GroupSession(offer, self._settings, self.name, host, remote, regions, channel, self._joining, deadline)


class Gloo(_GroupTransport):
    """Over TCP, between CPUs; GPU memory is staged through pinned buffers. Only used when asked for by name.

    Args:
        ports: the range in which the seed's store listens; any free port by default. gloo's own ports are not in it.
        rate_limit: bytes a second to one fork, at most; ``publish(rate_limit=)`` is for all together.
        joining: seconds that the two sides may take to find each other.
        parcel: bytes of one batch, which is sent and waited for as one; four are in flight at once.
        bucket: bytes of small copies that are packed into one batch.
        small: copies shorter than this are packed.
    """

    name: ClassVar[str] = "gloo"

    def __init__(
        self,
        *,
        ports: range | None = None,
        rate_limit: float | None = None,
        joining: float = 30.0,
        parcel: int = 4 << 20,
        bucket: int = 4 << 20,
        small: int = 256 << 10,
    ) -> None:
        settings = Settings(False, parcel, bucket, small)
        super().__init__(settings, ports=ports, rate_limit=rate_limit, joining=joining, stall=math.inf)

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        _require_gloo()
        return {"devices": _devices(regions)}


class NCCL(_GroupTransport):
    """Between GPUs of two processes, over the best path that NCCL finds; what is on the CPU goes over gloo.

    Args:
        ports: the range in which the seed's store listens; any free port by default. NCCL's own ports are not in it.
        rate_limit: bytes a second to one fork, at most; ``publish(rate_limit=)`` is for all together.
        max_ctas, min_ctas, cga_cluster_size: NCCL's limits for the footprint of its kernels (see
            `torch.distributed.ProcessGroupNCCL.Options`). The fork's take precedence over the seed's.
        joining: seconds that the two sides may take to find each other, and NCCL to create a communicator.
        stall: seconds after which the seed aborts a kernel of its own that still waits for the fork.
        parcel: bytes of one batch, which is sent and waited for as one; four are in flight at once.
        bucket: bytes of small copies that are packed into one batch; there are four buckets on each GPU.
        small: copies shorter than this are packed.
    """

    name: ClassVar[str] = "nccl"

    def __init__(
        self,
        *,
        ports: range | None = None,
        rate_limit: float | None = None,
        max_ctas: int | None = None,
        min_ctas: int | None = None,
        cga_cluster_size: int | None = None,
        joining: float = 30.0,
        stall: float = 10.0,
        parcel: int = 1 << 30,
        bucket: int = 3 << 20,
        small: int = 1 << 20,
    ) -> None:
        settings = Settings(True, parcel, bucket, small, CtaLimits(min_ctas, max_ctas, cga_cluster_size))
        super().__init__(settings, ports=ports, rate_limit=rate_limit, joining=joining, stall=stall)

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        devices = _devices(regions)
        gpus = [device for device in devices if device != "cpu"]
        if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
            raise TransportUnavailable("this torch was built without NCCL; use another build of it, or zeromq")
        if not gpus:
            raise TransportUnavailable("nccl moves GPU memory, and there is none in this model; use gloo, or zeromq")
        if "cpu" in devices:
            _require_gloo()
        if why_not := forbidden_changes(ENVIRONMENT):
            raise TransportUnavailable(f"nccl: {why_not}")
        version = list(torch.cuda.nccl.version()[:3])
        gpus = [cuda.device_uuid(device) for device in gpus]
        return {"devices": devices, "gpus": gpus, "version": version, "process": process_token()}

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """See `Transport.why_not`."""
        if fork["process"] == seed["process"]:  # seen: a segmentation fault, while both ends create their communicator
            return "both are one process, and NCCL may crash one that is both of its ends; use cuda_ipc, or gloo"
        if set(fork["gpus"]) & set(seed["gpus"]):
            return "both processes use the same GPU, which NCCL refuses; use cuda_ipc, or put the fork on another GPU"
        if fork["version"] != seed["version"]:
            ours, theirs = (".".join(map(str, facts["version"])) for facts in (fork, seed))
            return f"NCCL is {ours} here and {theirs} at the seed, and its versions do not mix; use the same torch"
        return None


def _limited(settings: Settings, rate: float | None) -> Settings:
    """The settings, with batches that are short enough for a rate limit."""
    batch = limited_piece(settings.batch, rate)
    bucket = min(settings.bucket, batch)
    return evolve(settings, batch=batch, bucket=bucket, small=min(settings.small, bucket))


def _devices(regions: Sequence[Region]) -> list[str]:
    devices = sorted({region.device for region in regions})
    if unsupported := [device for device in devices if device != "cpu" and not device.startswith("cuda:")]:
        raise TransportUnavailable(
            f"it moves memory of CPUs and CUDA's GPUs, and part of the model is on {unsupported[0]}"
        )
    return devices


def _require_gloo() -> None:
    if why_not := forbidden_changes(gloo_environment()):
        raise TransportUnavailable(f"gloo: {why_not}")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise TransportUnavailable("this torch was built without gloo; use another build of it, or zeromq")
    if not socket.if_nameindex():
        raise TransportUnavailable("gloo needs a network interface, and there is none here, not even loopback")
