"""What a lease copies its answers into before they are sent."""

from collections.abc import Sequence

from tensorfork.errors import TransportUnavailable
from tensorfork.memory import host_slots
from tensorfork.regions import Region
from tensorfork.transports.zeromq.protocol import FRAME, LENT


class AnswerBuffers:
    """The buffers of one lease, by their numbers: a share of the process's pool. Every answer takes one, also where it
    is not copied, so that their number bounds what waits to be sent. For one thread.

    Attributes:
        frame: the bytes of an answer at most.
        alone: the bytes of a range from which on it should be requested by itself, because it is lent then; 0 if
            none is.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.alone = LENT if all(region.stable and region.device == "cpu" for region in regions) else 0
        self._share = open_share(regions)
        self.frame = min(FRAME, self._share.slot_bytes)
        self._free = list(range(len(self._share.slots)))

    @property
    def lent(self) -> int:
        """How many are in use."""
        return len(self._share.slots) - len(self._free)

    def take(self) -> tuple[int, int] | None:
        """The number and the address of a buffer that nobody uses; None until one is given back."""
        if not self._free:
            return None
        number = self._free.pop()
        return number, self._share.slots[number]

    def give_back(self, number: int) -> None:
        """A buffer may be used again."""
        self._free.append(number)

    def close(self) -> None:
        """Return the share. Nothing may read the buffers any more."""
        self._share.close()


def open_share(regions: Sequence[Region]) -> host_slots.Share:
    """A share of the process's pool, pinned if any of the regions is on a GPU.

    Raises `TransportUnavailable` if there is none left, `ResourceExhausted` if it cannot be pinned.
    """
    gpus = [region.device for region in regions if region.device != "cpu"]
    try:
        return host_slots.pool().open_share(pinned_for=gpus[0] if gpus else None)
    except host_slots.NoShareLeft as error:
        raise TransportUnavailable(f"zeromq: {error}; try again when one has ended") from error
