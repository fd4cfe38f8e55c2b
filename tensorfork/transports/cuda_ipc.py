"""Between GPUs of one host, or within one, through CUDA IPC: no port, nothing to install.

The seed hands out a handle for each of its allocations through the bootstrap; the fork opens each once, and its own
copy engines read, over NVLink where there is one, while the seed's process takes no part. A handle is 64 bytes of plain
data, good only on this host. It opens the whole allocation, which can hold more than weights; that, and that a reader
keeps its mapping until it closes it, is why handles go only to whom the bootstrap lets in.

What of the model is on the CPU (a few buffers, as a rule) travels over the lease's channel.
"""

import ctypes
import os
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import ClassVar

import torch
from attrs import frozen

from tensorfork import cuda
from tensorfork.errors import PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.transports.base import (
    Channel,
    Copy,
    Export,
    Facts,
    Place,
    Region,
    RemoteRegion,
    Session,
    Site,
    Transport,
)

BATCH = 1 << 30
"""Bytes of copies that are enqueued together, and whose completion is one event: an event between two copies costs the
copy engine some 40 µs, measured on two H200."""
SMALL_BATCH = 32 << 20
"""The same for models of less than some of these, so that they too are seen to arrive."""
WINDOW = 3
"""Batches under way on a device."""
POLL = 50e-6
"""Seconds between two looks at the events."""
_OFFER = struct.Struct("<16sI")
_EXPORTED = struct.Struct(f"<QQ{cuda.HANDLE}s")
_ASKED = struct.Struct("<QQQ")
_SAID = 512 << 10
"""Bytes of a CPU's region in one message of the channel."""

_this_process = secrets.token_bytes(8)


class CudaIpc(Transport):
    """CUDA IPC between two processes of one host, or within one process.

    Args:
        rate_limit: bytes a second that a fork reads at most; as fast as the link allows, by default.
    """

    name: ClassVar[str] = "cuda_ipc"
    piece = 1 << 30

    def __init__(self, *, rate_limit: float | None = None) -> None:
        if rate_limit is not None and not rate_limit > 0:
            raise ValueError(f"rate_limit must be bytes a second, more than none, not {rate_limit}")
        self._rate_limit = rate_limit
        if rate_limit is not None:
            self.piece = SMALL_BATCH
        self._published: dict[int, int] = {}

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        devices = sorted({region.device for region in regions if region.device != "cpu"})
        if not devices:
            raise TransportUnavailable("cuda_ipc moves GPU memory, and there is none in this model")
        self._published |= {one.start: one.buffer_id for one in cuda.blocks(regions)}
        return {
            "host": cuda.host(),
            "process": _me(),
            "gpus": [cuda.uuid(device) for device in devices],
            "closed": cuda.why_not_exportable(regions),
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
        return cuda.cover(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> "_Export":
        """See `Transport.export`."""
        for one in cuda.blocks(regions):
            if self._published.get(one.start, one.buffer_id) != one.buffer_id:
                raise TransportUnavailable(
                    f"memory of the model at {one.start:#x} was freed and mapped anew since it was "
                    "published; publish again"
                )
        return _Export(regions, fork.get("process") == _me())

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> "_Session":
        """See `Transport.open`."""
        return _Session(offer, remote, regions, channel, self._rate_limit)


class _Export(Export):
    def __init__(self, regions: Sequence[Region], within: bool) -> None:
        self._host = {region.id: region for region in regions if region.device == "cpu"}
        try:
            exported = [
                _EXPORTED.pack(
                    region.id, region.address, bytes(cuda.HANDLE) if within else cuda.export_handle(region.address)
                )
                for region in regions
                if region.device != "cpu"
            ]
        except cuda.DriverError as error:
            raise TransportUnavailable(
                f"cuda_ipc: the seed's memory cannot be exported: {error}. Publish memory of cudaMalloc, and "
                "see that the container shares the host's IPC namespace"
            ) from error
        self.offer = _OFFER.pack(_me(), len(exported)) + b"".join(exported)
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
            id, offset, nbytes = _ASKED.unpack(asked)
            region = self._host.get(id)
            if region is None or nbytes > _SAID or offset + nbytes > region.nbytes:
                channel.send(b"", time.monotonic() + 1)
            else:
                channel.send(ctypes.string_at(region.address + offset, nbytes), time.monotonic() + 1)

    def close(self, deadline: float) -> bool:
        """See `Export.close`: a fork that did not say it has closed the handles may still read."""
        if self._serving.is_set():
            self._served.wait(max(0.0, deadline - time.monotonic()))
        return self._released


@frozen
class _Source:
    address: int
    nbytes: int
    handle: bytes | None


def _read(offer: bytes, remote: Sequence[RemoteRegion]) -> tuple[bool, dict[int, _Source]]:
    """Whether the seed is in this process, and where each of its regions is. Raises `TransportUnavailable`."""
    if len(offer) < _OFFER.size or (len(offer) - _OFFER.size) % _EXPORTED.size:
        raise TransportUnavailable("what the seed offers is not an offer of cuda_ipc; use one version on both sides")
    process, count = _OFFER.unpack_from(offer)
    sizes = {region.id: region.nbytes for region in remote if region.device != "cpu"}
    found = list(_EXPORTED.iter_unpack(offer[_OFFER.size :]))
    if len(found) != count or {id for id, _, _ in found} != sizes.keys():
        raise TransportUnavailable(
            "the seed's offer over cuda_ipc does not fit its regions; use one version on both sides"
        )
    within = process == _me()
    return within, {id: _Source(address, sizes[id], None if within else handle) for id, address, handle in found}


class _Session(Session):
    def __init__(
        self,
        offer: bytes,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        rate_limit: float | None,
    ) -> None:
        within, offered = _read(offer, remote)
        self.fabric = "same process" if within else "cuda ipc"
        self._channel, self._closed = channel, False
        self._rate_limit, self._began, self._launched = rate_limit, 0.0, 0
        self._remote = {region.id: region for region in remote}
        self._regions = {region.id: region for region in regions}
        self._sources = offered
        self._opened: dict[tuple[int, int], int] = {}
        devices = sorted({cuda.device_index(region.device) for region in regions if region.device != "cpu"})
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        try:
            if devices and self._sources:  # one now, to know that it can be done; the rest while bytes already move
                self._address(next(iter(self._sources)), devices[0])
        except BaseException:
            self.close(time.monotonic())
            raise

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        for copy in copies:
            self._check_bounds(copy)
        pending: list[tuple[int, Iterator[list[int]]]] = []
        for device, stream in self._streams.items():
            mine = [i for i, copy in enumerate(copies) if self._runs_on(copy) == device]
            stream.wait_stream(torch.cuda.current_stream(device))
            pending.append((device, _batches(copies, mine, self._rate_limit)))
        self._began, self._launched = time.monotonic(), 0
        flying: deque[tuple[torch.cuda.Event, list[int]]] = deque()
        try:
            while pending or flying:
                _check(deadline, cancel)
                pending = [one for one in pending if self._launch(*one, copies, flying)]
                while flying and flying[0][0].query():
                    for i in flying.popleft()[1]:
                        _check(deadline, cancel)
                        done(i)
                if len(flying) >= WINDOW * len(self._streams) or not pending or not self._may_launch():
                    time.sleep(POLL)
            for i, copy in enumerate(copies):
                if self._runs_on(copy) is None:
                    self._read_out(copy, deadline, cancel)
                    done(i)
        except cuda.DriverError as error:
            raise TransferFailed(f"reading over CUDA IPC failed: {error}") from error
        finally:
            for stream in self._streams.values():  # after a failure too, nothing is written once this has returned
                stream.synchronize()

    def close(self, deadline: float) -> None:
        """See `Session.close`."""
        if self._closed:
            return
        self._closed = True
        for (_, device), address in self._opened.items():
            cuda.close_handle(address, device)
        self._opened.clear()
        try:
            self._channel.send(b"", max(deadline, time.monotonic() + 1))
        except PeerUnreachable:
            return  # a seed that is gone needs not be told

    def _launch(
        self,
        device: int,
        batches: Iterator[list[int]],
        copies: Sequence[Copy],
        flying: deque[tuple["torch.cuda.Event", list[int]]],
    ) -> bool:
        """Enqueue what the window allows; False when there is nothing left."""
        stream = self._streams[device]
        with cuda.copying(stream) as enqueue:
            while len(flying) < WINDOW * len(self._streams) and self._may_launch():
                batch = next(batches, None)
                if batch is None:
                    return False
                for i in batch:
                    copy = copies[i]
                    to = self._regions[copy.into]
                    self._launched += copy.nbytes
                    enqueue(to.address + copy.at, self._address(copy.region, device) + copy.offset, copy.nbytes)
                event = torch.cuda.Event()
                event.record(stream)
                flying.append((event, batch))
        return True

    def _may_launch(self) -> bool:
        """Whether what has been launched is within the limit."""
        if self._rate_limit is None:
            return True
        return self._launched <= (time.monotonic() - self._began) * self._rate_limit

    def _address(self, id: int, device: int) -> int:
        """Where a remote region is for one of our GPUs."""
        source = self._sources[id]
        if source.handle is None:
            return source.address
        if (id, device) not in self._opened:
            try:
                self._opened[id, device] = cuda.open_handle(source.handle, device)
            except cuda.DriverError as error:
                raise TransportUnavailable(
                    f"cuda_ipc: the seed's memory cannot be opened on cuda:{device}: {error}. The GPUs may not "
                    "reach one another, or a container does not share the host's IPC and PID namespaces"
                ) from error
        return self._opened[id, device]

    def _runs_on(self, copy: Copy) -> int | None:
        device = self._regions[copy.into].device
        return None if device == "cpu" else cuda.device_index(device)

    def _check_bounds(self, copy: Copy) -> None:
        remote, ours = self._remote.get(copy.region), self._regions.get(copy.into)
        if remote is None or ours is None:
            raise TransferFailed(f"{copy} names a region that was not leased")
        if copy.offset + copy.nbytes > remote.nbytes or copy.at + copy.nbytes > ours.nbytes:
            raise TransferFailed(f"{copy} lies outside the leased regions")
        if (remote.device == "cpu") != (ours.device == "cpu"):
            raise TransportUnavailable("cuda_ipc does not move bytes between a GPU and a CPU; zeromq does")

    def _read_out(self, copy: Copy, deadline: float, cancel: Event) -> None:
        """Fetch bytes of the seed's CPU over the channel."""
        for start in range(0, copy.nbytes, _SAID):
            _check(deadline, cancel)
            nbytes = min(_SAID, copy.nbytes - start)
            self._channel.send(_ASKED.pack(copy.region, copy.offset + start, nbytes), deadline)
            said = self._channel.recv(deadline)
            if len(said) != nbytes:
                raise TransferFailed("the seed sent another number of bytes than was asked for")
            ctypes.memmove(self._regions[copy.into].address + copy.at + start, said, nbytes)


def _batches(copies: Sequence[Copy], indices: Sequence[int], rate_limit: float | None) -> Iterator[list[int]]:
    batch: list[int] = []
    nbytes = 0
    size = min(BATCH, max(SMALL_BATCH, sum(copies[i].nbytes for i in indices) // 16))
    if rate_limit is not None:
        size = min(size, SMALL_BATCH)
    for i in indices:
        batch.append(i)
        nbytes += copies[i].nbytes
        if nbytes >= size:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _check(deadline: float, cancel: Event) -> None:
    if cancel.is_set():
        raise TransferFailed("the transfer was cancelled")
    if time.monotonic() >= deadline:
        raise TransferFailed("the seed's memory was not read whole by the deadline")


def _me() -> bytes:
    """This process, in a way that survives neither os.fork() nor a second host."""
    return _this_process + os.getpid().to_bytes(8, "little")
