"""The fork's side of a lease: it opens the seed's handles, and its copy engines read."""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event

import torch
from attrs import frozen

from tensorfork.errors import PeerUnreachable, TransferFailed, TransportUnavailable
from tensorfork.memory import cuda, streams
from tensorfork.regions import Copy, Region, RemoteRegion
from tensorfork.transports.base import Channel, Session
from tensorfork.transports.checks import check_bounds, check_going_on
from tensorfork.transports.cuda_ipc.handles import RemoteHandles
from tensorfork.transports.cuda_ipc.offer import CPU_CHUNK, CPU_REQUEST, read_offer
from tensorfork.transports.rate_limit import RateLimiter

BATCH = 1 << 30
"""Bytes of copies, or a little more, that are enqueued together, and whose completion is one event: an event between
two copies costs the copy engine some 40 µs, measured on two H200."""
SMALL_BATCH = 32 << 20
"""The same for models of less than some of these, so that they too are seen to arrive."""
WINDOW = 3
"""Batches under way on a device."""
CATCH_UP = 0.01
"""Seconds lost by waking late that a rate limit makes up for."""
POLL = 50e-6
"""Seconds between two looks at the events."""


class IpcSession(Session):
    """See above. `rate_limit` is in bytes a second."""

    def __init__(
        self,
        offer: bytes,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        rate_limit: float | None,
    ) -> None:
        within, offered = read_offer(offer, remote)
        self.fabric = "same process" if within else "cuda ipc"
        self._channel, self._closed = channel, False
        self._rate_limit, self._limiter, self._deadline = rate_limit, RateLimiter(rate_limit), 0.0
        self._remote = {region.id: region for region in remote}
        self._regions = {region.id: region for region in regions}
        devices = sorted({cuda.device_index(region.device) for region in regions if region.device != "cpu"})
        self._streams = {device: streams.acquire_stream(device) for device in devices}
        self._memory = RemoteHandles(offered)
        try:
            if len(devices) == 1 and offered:
                self._memory.want([(id, devices[0]) for id in offered])
        except BaseException:
            self.close(time.monotonic())
            raise

    def ready(self, deadline: float) -> None:
        """See `Session.ready`: the first handle takes 10 ms, while CUDA learns of the other GPU. Those that follow are
        opened while bytes move: that takes longer than while nothing does, and less than one after the other.
        """
        try:
            self._memory.enough(deadline)
        except TransferFailed as error:
            raise TransportUnavailable(f"cuda_ipc: {error}") from error

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        """See `Session.pull`."""
        for copy in copies:
            self._check(copy)
        pending: list[_Pending] = []
        for device, stream in self._streams.items():
            mine = [i for i, copy in enumerate(copies) if self._runs_on(copy) == device]
            stream.wait_stream(torch.cuda.current_stream(device))
            self._memory.want(dict.fromkeys((copies[i].region, device) for i in mine))
            pending.append(_Pending(device, deque(mine), self._batch(sum(copies[i].nbytes for i in mine))))
        self._limiter, self._deadline = RateLimiter(self._rate_limit, catch_up=CATCH_UP), deadline
        flying: deque[_Flying] = deque()
        try:
            while pending or flying:
                check_going_on(deadline, cancel)
                pending = [one for one in pending if self._launch(one, copies, flying)]
                while flying and flying[0].event.query():
                    for i in flying.popleft().copies:
                        check_going_on(deadline, cancel)
                        done(i)
                if pending or flying:
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
        self._memory.close(deadline)
        while self._streams:
            streams.release_stream(self._streams.popitem()[1])
        try:
            self._channel.send(b"", max(deadline, time.monotonic() + 1))
        except PeerUnreachable:
            return  # a seed that is gone needs not be told

    def _launch(self, pending: "_Pending", copies: Sequence[Copy], flying: "deque[_Flying]") -> bool:
        """Enqueue what the window allows, and what of it is open by now; False when there is nothing left."""
        stream = self._streams[pending.device]
        while pending.copies and len(flying) < WINDOW * len(self._streams) and not self._limiter.wait(time.monotonic()):
            batch = self._open_by_now(pending, copies, sum(one.device == pending.device for one in flying))
            if not batch:
                break
            moves = []
            for i in batch:
                copy = copies[i]
                source = self._memory.address(copy.region, pending.device, self._deadline) + copy.offset
                moves.append((self._regions[copy.into].address + copy.at, source, copy.nbytes))
            self._limiter.spend(sum(nbytes for _, _, nbytes in moves), time.monotonic())
            with self._memory.pause():
                cuda.copy_batch(stream, moves)
                event = torch.cuda.Event()
                event.record(stream)
            flying.append(_Flying(pending.device, event, batch))
        return bool(pending.copies)

    def _open_by_now(self, pending: "_Pending", copies: Sequence[Copy], flying: int) -> list[int]:
        """The next copies whose handles are open: a batch of them, or fewer if the copy engine would soon have nothing
        to do; one that is to be waited for if it has nothing to do now.
        """
        nbytes = count = 0
        for i in pending.copies:
            if nbytes >= pending.batch or not self._memory.is_open(copies[i].region, pending.device):
                break
            nbytes += copies[i].nbytes
            count += 1
        whole = nbytes >= pending.batch or count == len(pending.copies)
        if not whole and flying > 1:
            return []
        return [pending.copies.popleft() for _ in range(count if flying else max(1, count))]

    def _batch(self, nbytes: int) -> int:
        """Bytes to be enqueued together, of so many."""
        batch = min(BATCH, max(SMALL_BATCH, nbytes // 8))
        return batch if self._rate_limit is None else min(batch, SMALL_BATCH)

    def _runs_on(self, copy: Copy) -> int | None:
        device = self._regions[copy.into].device
        return None if device == "cpu" else cuda.device_index(device)

    def _check(self, copy: Copy) -> None:
        check_bounds(copy, self._remote, self._regions)
        remote, ours = self._remote[copy.region], self._regions[copy.into]
        if (remote.device == "cpu") != (ours.device == "cpu"):
            raise TransportUnavailable("cuda_ipc does not move bytes between a GPU and a CPU; zeromq does")

    def _read_out(self, copy: Copy, deadline: float, cancel: Event) -> None:
        """Fetch bytes of the seed's CPU over the channel."""
        for start in range(0, copy.nbytes, CPU_CHUNK):
            check_going_on(deadline, cancel)
            nbytes = min(CPU_CHUNK, copy.nbytes - start)
            self._channel.send(CPU_REQUEST.pack(copy.region, copy.offset + start, nbytes), deadline)
            said = self._channel.recv(deadline)
            if len(said) != nbytes:
                raise TransferFailed("the seed sent another number of bytes than was asked for")
            ctypes.memmove(self._regions[copy.into].address + copy.at + start, said, nbytes)


@frozen
class _Pending:
    """What is still to be enqueued on a device."""

    device: int
    copies: deque[int]
    batch: int
    """Bytes to be enqueued together."""


@frozen
class _Flying:
    """A batch under way."""

    device: int
    event: "torch.cuda.Event"
    copies: Sequence[int]
