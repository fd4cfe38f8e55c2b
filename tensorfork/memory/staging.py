"""Host access to regions, for transports that send and receive from the host.

What is read is copied: from the CPU by the kernel, which reports memory that is gone, and from GPUs into pinned memory.
What is received goes in place on the CPU, and through pinned memory to GPUs. Pinned memory is bounded, allocated once,
and reused.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, groupby

import torch
from attrs import define, field

from tensorfork.errors import TransferFailed
from tensorfork.memory import cuda, host_reads, streams
from tensorfork.memory.host_reads import UnreadableMemory
from tensorfork.memory.raw import view_at
from tensorfork.regions import Region, contains, may_read


@define(eq=False, repr=False)
class PinnedBuffer:
    """One range of pinned memory. Its event says when the last copy out of it to a GPU is done."""

    address: int
    view: memoryview
    event: "torch.cuda.Event | None" = field(default=None)

    def wait(self) -> None:
        """Wait until the GPU has read what was in it."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class PinnedRing:
    """Pinned buffers, as (address, bytes), that are used in turn, and a stream of its own for each GPU."""

    def __init__(self, devices: Iterable[str], buffers: Sequence[tuple[int, int]]) -> None:
        self._streams = {device: streams.acquire_stream(cuda.device_index(device)) for device in sorted(set(devices))}
        self._buffers = deque(PinnedBuffer(address, view_at(address, nbytes)) for address, nbytes in buffers)

    def next_buffer(self) -> PinnedBuffer:
        """The buffer that was used longest ago, once the GPU has read what was in it."""
        buffer = self._buffers.popleft()
        self._buffers.append(buffer)
        buffer.wait()
        return buffer

    def wait_for_current_streams(self) -> None:
        """Copies enqueued from here on wait for what this thread's current streams have been given so far."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def read(self, device: str, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy (to, from, bytes) from a GPU to pinned memory; wait until that is done. Raises `cuda.DriverError`."""
        stream = self._streams[device]
        try:
            cuda.copy_to_host(stream, copies)
        finally:
            stream.synchronize()  # also what was enqueued before an error: nothing is written to the buffer any more

    def enqueue_write(self, device: str, copies: Iterable[tuple[int, int, int]]) -> "torch.cuda.Event":
        """Enqueue copies (to, from, bytes) from pinned memory to a GPU. The event says when they are done.

        Raises `cuda.DriverError` for memory that is not mapped.
        """
        stream = self._streams[device]
        cuda.copy_to_device(stream, copies)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def synchronize(self) -> None:
        """Wait until all enqueued copies are done."""
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Return the streams to the pool. Nothing may be enqueued afterwards."""
        while self._streams:
            streams.release_stream(self._streams.popitem()[1])


class HostAccess:
    """Reads and writes regions of ours from the host. A range of bytes is (region id, offset, bytes).

    Args:
        regions: on the CPU, on GPUs, or both.
        buffers: pinned memory, as (address, bytes), for `next_buffer`. It must outlive this.
    """

    def __init__(self, regions: Sequence[Region], buffers: Sequence[tuple[int, int]] = ()) -> None:
        self._regions = {region.id: region for region in regions}
        gpus = {region.device for region in regions if region.device != "cpu"}
        self._ring = PinnedRing(gpus, buffers) if gpus else None

    def contains(self, ranges: Sequence[tuple[int, int, int]], most: int) -> bool:
        """Whether all ranges lie within our regions, and have `most` bytes together at most."""
        return self._all(contains, ranges, most)

    def may_read(self, ranges: Sequence[tuple[int, int, int]], most: int) -> bool:
        """Whether another process may read all ranges, and they have `most` bytes together at most."""
        return self._all(may_read, ranges, most)

    def all_stable(self, ranges: Sequence[tuple[int, int, int]]) -> bool:
        """Whether all ranges are on the CPU, in memory that may be lent (`Region.stable`)."""
        return all(self._regions[id].stable and self._regions[id].device == "cpu" for id, _, _ in ranges)

    def spans(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """The (address, bytes) of each range, in its own memory."""
        return [(self._regions[id].address + offset, nbytes) for id, offset, nbytes in ranges]

    def read(self, ranges: Sequence[tuple[int, int, int]], into: int) -> None:
        """Copy the ranges one after another to the address `into`: pinned memory, if any region is on a GPU.

        Raises `UnreadableMemory` for memory that is not mapped any more; what lies at `into` is undefined then.
        """
        for device, some in groupby(ranges, lambda one: self._regions[one[0]].device):
            spans = self.spans(list(some))
            if device == "cpu":
                host_reads.read(spans, into)
            else:
                self._read_gpu(device, spans, into)
            into += sum(nbytes for _, nbytes in spans)

    def device(self, id: int) -> str:
        """The device of a region."""
        return self._regions[id].device

    def view(self, id: int, offset: int, nbytes: int) -> memoryview:
        """A range of a region on the CPU. The region must outlive the view."""
        return view_at(self._regions[id].address + offset, nbytes)

    def next_buffer(self) -> PinnedBuffer:
        """See `PinnedRing.next_buffer`. There must be regions on GPUs, and buffers."""
        assert self._ring is not None
        return self._ring.next_buffer()

    def write(self, buffer: PinnedBuffer, ranges: Sequence[tuple[int, int, int]]) -> "torch.cuda.Event":
        """Enqueue copies of a buffer's bytes, one after another, to ranges of regions on one GPU.

        The event says when they are done. Raises `TransferFailed` if that memory is not mapped.
        """
        assert self._ring is not None
        spans, device = self.spans(ranges), self.device(ranges[0][0])
        starts = accumulate((nbytes for _, nbytes in spans), initial=buffer.address)
        copies = [(to, source, nbytes) for source, (to, nbytes) in zip(starts, spans, strict=False)]
        try:
            buffer.event = self._ring.enqueue_write(device, copies)
        except cuda.DriverError as error:
            raise TransferFailed(f"our own memory on {device} is not mapped (any more): {error}") from error
        return buffer.event

    def _read_gpu(self, device: str, spans: Sequence[tuple[int, int]], into: int) -> None:
        assert self._ring is not None
        starts = accumulate((nbytes for _, nbytes in spans), initial=into)
        try:
            self._ring.read(device, [(to, *span) for to, span in zip(starts, spans, strict=False)])
        except cuda.DriverError as error:
            raise UnreadableMemory(f"memory on {device} is not mapped in this process any more: {error}") from error

    def _all(
        self, allowed: Callable[[Region, int, int], bool], ranges: Sequence[tuple[int, int, int]], most: int
    ) -> bool:
        total = 0
        for id, offset, nbytes in ranges:
            region = self._regions.get(id)
            if region is None or not allowed(region, offset, nbytes):
                return False
            total += nbytes
        return total <= most

    def wait_for_current_streams(self) -> None:
        """See `PinnedRing.wait_for_current_streams`."""
        if self._ring is not None:
            self._ring.wait_for_current_streams()

    def synchronize(self) -> None:
        """Wait until nothing is written to a GPU any more."""
        if self._ring is not None:
            self._ring.synchronize()

    def close(self) -> None:
        """Return the streams to the pool. Nothing may be read or written afterwards."""
        if self._ring is not None:
            self._ring.close()
