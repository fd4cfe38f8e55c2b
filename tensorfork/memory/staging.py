"""Host access to regions, for transports that send and receive from the host: regions on the CPU are accessed in place,
those on GPUs through pinned memory, which is bounded, allocated once, and reused.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from attrs import define, field

from tensorfork.memory import cuda, streams
from tensorfork.memory.raw import view_at
from tensorfork.regions import Region, contains


@define(eq=False, repr=False)
class PinnedBuffer:
    """One range of pinned memory. Its event says when the last copy out of it to a GPU is done."""

    tensor: torch.Tensor
    address: int
    view: memoryview
    event: "torch.cuda.Event | None" = field(default=None)

    def wait(self) -> None:
        """Wait until the GPU has read what was in it."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class PinnedRing:
    """Pinned buffers that are used in turn, and a stream of its own for each GPU.

    Allocates everything when it is made. Where CUDA graphs may be captured meanwhile, make it on a thread that has
    relaxed its capture mode (`cuda.relax_capture`).
    """

    def __init__(self, devices: Iterable[str], count: int, nbytes: int) -> None:
        self._streams = {device: streams.acquire_stream(cuda.device_index(device)) for device in sorted(set(devices))}
        self._buffers: deque[PinnedBuffer] = deque()
        for _ in range(count):
            tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            address = tensor.data_ptr()
            self._buffers.append(PinnedBuffer(tensor, address, view_at(address, nbytes)))

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

    def copy(self, device: str, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copy (to, from, bytes) between a GPU and pinned memory; wait until that is done."""
        self.enqueue_copies(device, copies).synchronize()

    def enqueue_copies(self, device: str, copies: Iterable[tuple[int, int, int]]) -> "torch.cuda.Event":
        """Enqueue such copies. The event says when they are done."""
        stream = self._streams[device]
        cuda.copy_one_by_one(stream, copies)
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
        buffers: how many pinned buffers to allocate, if there are regions on GPUs.
        nbytes: the size of each.
    """

    def __init__(self, regions: Sequence[Region], buffers: int, nbytes: int) -> None:
        self._regions = {region.id: region for region in regions}
        gpus = {region.device for region in regions if region.device != "cpu"}
        self._ring = PinnedRing(gpus, buffers, nbytes) if gpus else None

    def contains(self, ranges: Sequence[tuple[int, int, int]], most: int) -> bool:
        """Whether all ranges lie within our regions, and have `most` bytes together at most."""
        total = 0
        for id, offset, nbytes in ranges:
            region = self._regions.get(id)
            if region is None or not contains(region, offset, nbytes):
                return False
            total += nbytes
        return total <= most

    def any_on_gpu(self, ranges: Sequence[tuple[int, int, int]]) -> bool:
        """Whether any of the ranges is on a GPU, so that reading them takes a buffer."""
        return self._ring is not None and any(self._regions[id].device != "cpu" for id, _, _ in ranges)

    def addresses(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """The (address, bytes) of each range. All of them must be on the CPU."""
        return [(self._regions[id].address + offset, nbytes) for id, offset, nbytes in ranges]

    def read(self, ranges: Sequence[tuple[int, int, int]], buffer: PinnedBuffer) -> list[memoryview]:
        """The bytes of each range: of regions on the CPU in place; those on GPUs are copied to the buffer first."""
        frames: list[memoryview] = []
        copies: dict[str, list[tuple[int, int, int]]] = {}
        used = 0
        for id, offset, nbytes in ranges:
            region = self._regions[id]
            if region.device == "cpu":
                frames.append(view_at(region.address + offset, nbytes))
                continue
            copies.setdefault(region.device, []).append((buffer.address + used, region.address + offset, nbytes))
            frames.append(buffer.view[used : used + nbytes])
            used += nbytes
        for device, of_device in copies.items():
            assert self._ring is not None
            self._ring.copy(device, of_device)
        return frames

    def view(self, id: int, offset: int, nbytes: int) -> memoryview:
        """A range of a region on the CPU. The region must outlive the view."""
        return view_at(self._regions[id].address + offset, nbytes)

    def next_buffer(self) -> PinnedBuffer:
        """See `PinnedRing.next_buffer`. There must be regions on GPUs."""
        assert self._ring is not None
        return self._ring.next_buffer()

    def buffer_for(self, id: int) -> PinnedBuffer | None:
        """A buffer to receive what goes to a region on a GPU; None for the CPU, where it is received in place."""
        return None if self._regions[id].device == "cpu" else self.next_buffer()

    def write(self, buffer: PinnedBuffer, id: int, offset: int, nbytes: int) -> "torch.cuda.Event":
        """Enqueue the copy of a buffer's bytes to a region on a GPU. The event says when it is done."""
        assert self._ring is not None
        region = self._regions[id]
        return self._ring.enqueue_copies(region.device, [(region.address + offset, buffer.address, nbytes)])

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
