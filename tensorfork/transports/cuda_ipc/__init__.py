"""Between GPUs of one host, or within one, through CUDA IPC: no port, nothing to install.

The seed hands out a handle for each of its allocations through the bootstrap; the fork opens each once, and its own
copy engines read, over NVLink where there is one, while the seed's process takes no part. A handle is 64 bytes of plain
data, good only on this host. It opens the whole allocation, which can hold more than weights; that, and that a reader
keeps its mapping until it closes it, is why handles go only to whom the bootstrap lets in.

What of the model is on the CPU (a few buffers, as a rule) travels over the lease's channel.
"""

import ctypes
import time
from collections.abc import Sequence
from threading import Event
from typing import ClassVar

from tensorfork.errors import PeerUnreachable, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.interpreter.process import process_token
from tensorfork.memory import allocations, cuda
from tensorfork.memory.allocations import Allocation, PublishedAllocations
from tensorfork.regions import Place, Region, RemoteRegion
from tensorfork.transports.base import Channel, Export, Facts, Site, Transport
from tensorfork.transports.cuda_ipc.offer import CPU_CHUNK, CPU_REQUEST, write_offer
from tensorfork.transports.cuda_ipc.session import SMALL_BATCH, IpcSession
from tensorfork.transports.rate_limit import check_rate


class CudaIpc(Transport):
    """CUDA IPC between two processes of one host, or within one process.

    Args:
        rate_limit: bytes a second that a fork reads at most; as fast as the link allows, by default.
    """

    name: ClassVar[str] = "cuda_ipc"
    piece = 1 << 30

    def __init__(self, *, rate_limit: float | None = None) -> None:
        check_rate(rate_limit)
        self._rate_limit = rate_limit
        if rate_limit is not None:
            self.piece = SMALL_BATCH
        self._published = PublishedAllocations()
        self._told: tuple[Sequence[Region], Sequence[Allocation], bytes] | None = None  # at the last lease

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        devices = sorted({region.device for region in regions if region.device != "cpu"})
        if not devices:
            raise TransportUnavailable("cuda_ipc moves GPU memory, and there is none in this model")
        found = self._published.add(regions)
        return {
            "host": process.host_id(),
            "process": process_token(),
            "gpus": [cuda.device_uuid(device) for device in devices],
            "closed": allocations.why_not_exportable(found),
        }

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """See `Transport.why_not`."""
        if fork.get("host") != seed.get("host"):
            return "the seed is on another host, and CUDA IPC works within one"
        if fork.get("process") == seed.get("process"):
            return None
        closed = seed.get("closed")
        return None if closed is None else str(closed)

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """See `Transport.cover`: handles are for whole allocations."""
        return allocations.enclosing_allocations(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> "IpcExport":
        """See `Transport.export`."""
        found = self._published.check(regions)
        if fork.get("process") == process_token():
            return IpcExport(regions, write_offer(regions, {}))
        told = self._told
        if told is not None and told[0] is regions and told[1] == found:
            return IpcExport(regions, told[2])
        try:
            said = write_offer(regions, {one.start: cuda.export_ipc_handle(one.start, one.device) for one in found})
            self._told = regions, found, said
            return IpcExport(regions, said)
        except cuda.DriverError as error:
            raise TransportUnavailable(
                f"cuda_ipc: the seed's memory cannot be exported: {error}. Publish memory of cudaMalloc, and "
                "see that the container shares the host's IPC namespace"
            ) from error

    def forget(self, regions: Sequence[Region]) -> None:
        """See `Transport.forget`."""
        self._told = None

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
    """One lease."""

    def __init__(self, regions: Sequence[Region], offer: bytes) -> None:
        self.offer = offer
        self._host = {region.id: region for region in regions if region.device == "cpu"}
        self._released = False
        self._serving, self._served = Event(), Event()

    def serve(self, channel: Channel) -> None:
        """See `Export.serve`: regions on the CPU are read out on the channel; the rest needs nobody."""
        self._serving.set()
        try:
            self._serve(channel)
        except PeerUnreachable:
            return  # the lease has ended without a word
        finally:
            self._served.set()

    def _serve(self, channel: Channel) -> None:
        while True:
            asked = channel.recv(time.monotonic() + 86400)
            if asked == b"":
                self._released = True
                return
            id, offset, nbytes = CPU_REQUEST.unpack(asked)
            region = self._host.get(id)
            if region is None or nbytes > CPU_CHUNK or offset + nbytes > region.nbytes:
                channel.send(b"", time.monotonic() + 1)
            else:
                channel.send(ctypes.string_at(region.address + offset, nbytes), time.monotonic() + 1)

    def close(self, deadline: float) -> bool:
        """See `Export.close`: a fork that did not say it has closed the handles may still read."""
        if self._serving.is_set():
            self._served.wait(max(0.0, deadline - time.monotonic()))
        return self._released
