"""CUDA IPC between GPUs of one host, or within one GPU: it opens no port, and needs nothing to be installed.

The seed's offer has an IPC handle for each of its allocations. The fork opens each once, and its own copy engines read,
over NVLink where there is one; the seed's process takes no part. A handle is 64 bytes of plain data, valid only on this
host. It opens the whole allocation, which can hold more than weights, and a fork keeps its mapping until it closes the
handle; so handles are sent only to forks that were granted a lease.

Tensors on the CPU (as a rule, a few buffers) travel over the lease's channel.
"""

import ctypes
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Event
from typing import ClassVar

from tensorfork.errors import PeerUnreachable, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.interpreter.process import process_token
from tensorfork.memory import allocations, cuda, host_reads
from tensorfork.memory.allocations import Allocation, PublishedAllocations
from tensorfork.regions import Place, Region, RemoteRegion, may_read
from tensorfork.transports.base import Channel, Export, Facts, Site, Transport
from tensorfork.transports.cuda_ipc.offer import CPU_CHUNK, CPU_REQUEST, RELEASED, STOP, write_offer
from tensorfork.transports.cuda_ipc.session import SMALL_BATCH, IpcSession
from tensorfork.transports.rate_limit import limited_piece
from tensorfork.transports.rate_limit import rate_limit as checked

START_TIMEOUT = 0.2
"""Seconds that the end of a lease waits for `serve` to begin, where it has not: without it the fork cannot be told."""
LAST_MESSAGE_TIMEOUT = 0.02
"""Seconds that it then waits for a message that has come and not been read: a fork that ends by itself sends one."""

log = logging.getLogger("tensorfork")


class CudaIpc(Transport):
    """CUDA IPC between two processes of one host, or within one process.

    Args:
        rate_limit: bytes a second that this fork reads at most; by default as fast as the link allows. Give it to
            `fork_into`: on a seed it has no effect, since forks read by themselves. A seed's limit is
            ``publish(rate_limit=)``; the smaller one counts.
    """

    name: ClassVar[str] = "cuda_ipc"
    rate_limited_by = "fork"
    piece = 1 << 30

    def __init__(self, *, rate_limit: float | None = None) -> None:
        self._rate_limit = checked(rate_limit)
        if self._rate_limit is not None:
            self.piece = self.limited_piece(self._rate_limit)
        self._published = PublishedAllocations()
        self._last_offer: tuple[Sequence[Region], Sequence[Allocation], bytes] | None = None

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        devices = sorted({region.device for region in regions if region.device != "cpu"})
        if not devices:
            raise TransportUnavailable("cuda_ipc moves GPU memory, and there is none in this model")
        published = self._published.add(regions)
        return {
            "host": process.host_id(),
            "process": process_token(),
            "gpus": [cuda.device_uuid(device) for device in devices],
            "closed": allocations.why_not_exportable(published),
        }

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """See `Transport.why_not`."""
        if fork.get("host") != seed.get("host"):
            return "the seed is on another host, and CUDA IPC works within one"
        if fork.get("process") == seed.get("process"):
            return None
        not_exportable = seed.get("closed")
        return None if not_exportable is None else str(not_exportable)

    def limited_piece(self, rate: float) -> int:
        """See `Transport.limited_piece`."""
        return limited_piece(min(self.piece, SMALL_BATCH), rate)

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """See `Transport.cover`: a handle opens a whole allocation."""
        return allocations.enclosing_allocations(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> "IpcExport":
        """See `Transport.export`."""
        published = self._published.check(regions)
        if fork.get("process") == process_token():
            return IpcExport(regions, write_offer(regions, {}))
        last = self._last_offer
        if last is not None and last[0] is regions and last[1] == published:
            return IpcExport(regions, last[2])
        try:
            handles = {one.start: cuda.export_ipc_handle(one.start, one.device) for one in published}
            offer = write_offer(regions, handles)
            self._last_offer = regions, published, offer
            return IpcExport(regions, offer)
        except cuda.DriverError as error:
            raise TransportUnavailable(
                f"cuda_ipc: the seed's memory cannot be exported: {error}. Publish memory of cudaMalloc, and "
                "let the container share the host's IPC namespace"
            ) from error

    def forget(self, regions: Sequence[Region]) -> None:
        """See `Transport.forget`."""
        self._last_offer = None

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> IpcSession:
        """See `Transport.open`."""
        return IpcSession(offer, remote, regions, channel, self._rate_limit)


class IpcExport(Export):
    """The seed's side of one lease."""

    def __init__(self, regions: Sequence[Region], offer: bytes) -> None:
        self.offer = offer
        self._cpu_regions = {region.id: region for region in regions if region.device == "cpu"}
        self._released = False  # whether the fork has said that it closed the handles
        self._channel: Channel | None = None
        self._serve_started, self._serve_ended, self._closing = Event(), Event(), Event()

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`: sends the bytes of CPU regions on the channel. Forks read GPU regions by themselves."""
        self._channel = channel
        self._serve_started.set()
        try:
            self._serve(channel)
        except PeerUnreachable:
            return  # the lease has ended, and the fork has not said that it closed the handles
        finally:
            self._serve_ended.set()

    def _serve(self, channel: Channel) -> None:
        while True:
            request = channel.recv(time.monotonic() + 86400)
            if request == RELEASED:
                self._released = True
                return
            channel.send(self._answer(request), time.monotonic() + 1)

    def _answer(self, request: bytes) -> bytes:
        """The bytes that are requested; `STOP` for what was not published or is gone, and once the lease ends."""
        if self._closing.is_set() or len(request) != CPU_REQUEST.size:
            return STOP
        id, offset, nbytes = CPU_REQUEST.unpack(request)
        region = self._cpu_regions.get(id)
        if region is None or not 0 < nbytes <= CPU_CHUNK or not may_read(region, offset, nbytes):
            return STOP
        answer = bytearray(nbytes)
        try:
            host_reads.read([(region.address + offset, nbytes)], ctypes.addressof(ctypes.c_char.from_buffer(answer)))
        except host_reads.UnreadableMemory as error:
            log.warning("a fork requested what was published, and cannot be read any more: %s", error)
            return STOP
        return bytes(answer)

    def close(self, deadline: float) -> bool:
        """See `Export.close`. A fork that still reads is told to stop, and waited for, where the channel allows it.

        Returns True if the fork has said that it closed the handles; otherwise it may still read, since nothing can
        take a handle away from it.
        """
        self._closing.set()
        if self._serve_started.wait(_seconds(deadline, START_TIMEOUT)):
            assert self._channel is not None
            if not self._serve_ended.wait(_seconds(deadline, LAST_MESSAGE_TIMEOUT)):
                with suppress(PeerUnreachable):
                    self._channel.send(STOP, deadline)
                self._serve_ended.wait(_seconds(deadline))
        return self._released


def _seconds(deadline: float, most: float = math.inf) -> float:
    return max(0.0, min(deadline - time.monotonic(), most))
