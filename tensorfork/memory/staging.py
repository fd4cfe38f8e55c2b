"""Regions for transports that send and receive from the host: those of the CPU in place, those of GPUs through pinned
memory, which is bounded, taken once, and used again and again.
"""

import ctypes
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from attrs import define, field

from tensorfork.memory import cuda, streams
from tensorfork.regions import Region


@define(eq=False)
class PinnedBuffer:
    """One stretch of pinned memory. `free` says when whatever used it last is through with it."""

    tensor: torch.Tensor
    address: int
    view: memoryview
    event: "torch.cuda.Event | None" = field(default=None)

    def wait(self) -> None:
        """Until the GPU has read what was in it."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class PinnedRing:
    """A ring of slots, and a stream of its own for each GPU.

    All memory is taken when this is made, on a thread that has relaxed its capture mode (`cuda.relax_capture`) where a
    graph may be captured meanwhile.
    """

    def __init__(self, devices: Iterable[str], slots: int, nbytes: int) -> None:
        self._streams = {device: streams.acquire_stream(cuda.device_index(device)) for device in sorted(set(devices))}
        self.slots: deque[PinnedBuffer] = deque()
        for _ in range(slots):
            tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            address = tensor.data_ptr()
            self.slots.append(PinnedBuffer(tensor, address, _view(address, nbytes)))

    def wait_for_callers(self) -> None:
        """Let what this thread's current streams still do to the memory finish before any copy from here on."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self, device: str, copies: Iterable[tuple[int, int, int]]) -> None:
        """Copies of (to, from, bytes) between a GPU and pinned memory; waits until they are done."""
        self.begin(device, copies).synchronize()

    def begin(self, device: str, copies: Iterable[tuple[int, int, int]]) -> "torch.cuda.Event":
        """Enqueue such copies; the event says when they are done."""
        stream = self._streams[device]
        cuda.copy_one_by_one(stream, copies)
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def synchronize(self) -> None:
        """Until nothing is under way."""
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Give the streams back; nothing is to be begun any more."""
        while self._streams:
            streams.release_stream(self._streams.popitem()[1])


class HostAccess:
    """Our regions: those of the CPU as views, those of GPUs through staging."""

    def __init__(self, regions: Sequence[Region], slots: int, nbytes: int) -> None:
        self._regions = {region.id: region for region in regions}
        gpus = {region.device for region in regions if region.device != "cpu"}
        self._staging = PinnedRing(gpus, slots, nbytes) if gpus else None

    def holds(self, stretches: Sequence[tuple[int, int, int]], most: int) -> bool:
        """Whether all of (region, offset, bytes) lie inside, and together are no more than so many bytes."""
        total = 0
        for id, offset, nbytes in stretches:
            region = self._regions.get(id)
            if region is None or offset + nbytes > region.nbytes:
                return False
            total += nbytes
        return total <= most

    def staged(self, stretches: Sequence[tuple[int, int, int]]) -> bool:
        """Whether any of them is a GPU's."""
        return self._staging is not None and any(self._regions[id].device != "cpu" for id, _, _ in stretches)

    def addresses(self, stretches: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """The (address, bytes) of each of them, none of them a GPU's."""
        return [(self._regions[id].address + offset, nbytes) for id, offset, nbytes in stretches]

    def read(self, stretches: Sequence[tuple[int, int, int]], slot: PinnedBuffer) -> list[memoryview]:
        """Their bytes: in place, or, of GPUs, in the slot."""
        frames: list[memoryview] = []
        fetched: dict[str, list[tuple[int, int, int]]] = {}
        used = 0
        for id, offset, nbytes in stretches:
            region = self._regions[id]
            if region.device == "cpu":
                frames.append(_view(region.address + offset, nbytes))
                continue
            fetched.setdefault(region.device, []).append((slot.address + used, region.address + offset, nbytes))
            frames.append(slot.view[used : used + nbytes])
            used += nbytes
        for device, copies in fetched.items():
            assert self._staging is not None
            self._staging.fetch(device, copies)
        return frames

    def view(self, id: int, at: int, nbytes: int) -> memoryview:
        """A stretch of a region on the CPU, which holds it."""
        return _view(self._regions[id].address + at, nbytes)

    def next_slot(self) -> PinnedBuffer:
        """The slot used longest ago; the GPU is through with it."""
        assert self._staging is not None
        slot = self._staging.slots.popleft()
        self._staging.slots.append(slot)
        slot.wait()
        return slot

    def slot_for(self, id: int) -> PinnedBuffer | None:
        """A free slot for what goes to a GPU; None for the CPU, where it can be received in place."""
        return None if self._regions[id].device == "cpu" else self.next_slot()

    def land(self, slot: PinnedBuffer, id: int, at: int, nbytes: int) -> "torch.cuda.Event":
        """Begin to copy a slot to where its bytes belong."""
        assert self._staging is not None
        region = self._regions[id]
        return self._staging.begin(region.device, [(region.address + at, slot.address, nbytes)])

    def wait_for_callers(self) -> None:
        """See `PinnedRing.wait_for_callers`."""
        if self._staging is not None:
            self._staging.wait_for_callers()

    def synchronize(self) -> None:
        """Until no GPU is written to any more."""
        if self._staging is not None:
            self._staging.synchronize()

    def close(self) -> None:
        """Nothing is to be read or written any more."""
        if self._staging is not None:
            self._staging.close()


_from_memory = ctypes.pythonapi.PyMemoryView_FromMemory

_from_memory.argtypes = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int

_from_memory.restype = ctypes.py_object

_WRITABLE = 0x200


def _view(address: int, nbytes: int) -> memoryview:
    """A stretch of memory, which whoever uses the view keeps alive. Made for each stretch when it is needed: a view of
    each of 20,000 regions, made for each lease, has Python's collector stop the seed for a tenth of a second.
    """
    view: memoryview = _from_memory(address, nbytes, _WRITABLE)
    return view
