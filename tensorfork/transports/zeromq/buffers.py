"""What a lease copies its answers into before they are sent."""

from collections.abc import Sequence

from tensorfork.errors import TransportUnavailable
from tensorfork.memory import host_slots
from tensorfork.memory.staging import HostAccess
from tensorfork.regions import Region
from tensorfork.transports.zeromq.protocol import FRAME, LENT

PINNED_BUFFERS = 16
"""Pinned buffers of a lease on GPU memory, `FRAME` bytes each."""


class AnswerBuffers:
    """The buffers of one lease, by their numbers: a share of the process's pool, or pinned buffers of its own if any of
    the regions is on a GPU. Every answer takes one, also where it is not copied, so that their number bounds what waits
    to be sent. For one thread.

    Attributes:
        frame: the bytes of an answer at most.
        alone: the bytes of a range from which on it should be requested by itself, because it is lent then; 0 if
            none is.
    """

    def __init__(self, regions: Sequence[Region], memory: HostAccess) -> None:
        self.frame = FRAME
        self.alone = LENT if all(region.stable and region.device == "cpu" for region in regions) else 0
        self._share: host_slots.Share | None = None
        self._addresses: Sequence[int] = ()
        if any(region.device != "cpu" for region in regions):
            self._addresses = [memory.next_buffer().address for _ in range(PINNED_BUFFERS)]
        else:
            try:
                self._share = host_slots.pool().open_share()
            except host_slots.NoShareLeft as error:
                raise TransportUnavailable(f"zeromq: {error}; try again when one has ended") from error
            self._addresses, self.frame = self._share.slots, min(FRAME, self._share.slot_bytes)
        self._free = list(range(len(self._addresses)))

    def take(self) -> tuple[int, int] | None:
        """The number and the address of a buffer that nobody uses; None until one is given back."""
        if not self._free:
            return None
        number = self._free.pop()
        return number, self._addresses[number]

    def give_back(self, number: int) -> None:
        """A buffer may be used again."""
        self._free.append(number)

    def close(self) -> None:
        """Return the share. Nothing may read the buffers any more."""
        if self._share is not None:
            self._share.close()
