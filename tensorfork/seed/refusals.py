"""What a fork is told whose lease is refused or ended, and why."""

import logging

from tensorfork.errors import SeedMoved, TensorForkError
from tensorfork.exhaustion import exhausted
from tensorfork.seed.leases import Lease
from tensorfork.wire import messages

log = logging.getLogger("tensorfork")

CHANGED = messages.Refused(messages.CHANGED, "the seed has published other tensors, or other memory, since; fork again")
ASLEEP = messages.Refused(messages.ASLEEP, "the seed is suspended: its memory may not be there. Allow wait=, or go on")
DRAINING = messages.Refused(messages.BUSY, "the seed takes no more forks: it is draining; ask another one")


def moved(error: SeedMoved) -> messages.Refused:
    """What a fork is told where tensors are not where they were published."""
    return messages.Refused(messages.MOVED, str(error), list(error.tensors))


def refusal(lease: Lease, error: Exception) -> messages.Refused:
    """What a fork is told of an error before or during its lease."""
    if lease.ended.is_set():
        return lease.why
    if isinstance(error, SeedMoved):
        return moved(error)
    if found := exhausted(error):
        log.warning("%s is refused: %s", lease, found)
        return messages.Refused(messages.BUSY, f"the seed cannot serve another fork: {found}")
    if not isinstance(error, TensorForkError):
        log.exception("the transport failed to export: %s is refused", lease)
    return messages.Refused(messages.UNAVAILABLE, f"the seed cannot export over {lease.transport}: {error}")
