"""Ways in which a transport can go wrong, on purpose."""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event

import torch
from attrs import define, field, frozen

from tensorfork import (
    Channel,
    Copy,
    Export,
    Facts,
    Place,
    Region,
    RemoteRegion,
    Session,
    Site,
    TransferFailed,
    Transport,
    TransportUnavailable,
)

Reach = Callable[[Region], torch.Tensor]
"""The bytes of a region, as a uint8 tensor over the same memory."""


def bytes_of(region: Region) -> torch.Tensor:
    """The bytes of a region in the host's memory, or a GPU's."""
    if region.device == "cpu":
        return torch.frombuffer((ctypes.c_char * region.nbytes).from_address(region.address), dtype=torch.uint8)
    if region.device.startswith("cuda"):
        return torch.as_tensor(_OnAGpu(region), device=region.device)
    raise ValueError(f"give FaultyTransport a memory= that reaches {region.device}")


class _OnAGpu:
    """What torch makes a tensor of: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, region: Region) -> None:
        place = (region.address, False)
        self.__cuda_array_interface__ = {"shape": (region.nbytes,), "typestr": "|u1", "data": place, "version": 2}


@frozen
class Job:
    """One pull, as a fault gets it: everything the caller gave, and the session that would do it right.

    Attributes:
        number: how many copies this session was asked for before.
    """

    inner: Session
    memory: Mapping[int, torch.Tensor]
    copies: Sequence[Copy]
    deadline: float
    done: Callable[[int], None]
    cancel: Event
    number: int

    def bytes_of(self, i: int) -> torch.Tensor:
        """The destination of a copy."""
        copy = self.copies[i]
        return self.memory[copy.into][copy.at : copy.at + copy.nbytes]

    def settle(self) -> None:
        """Wait until what was done to the destinations can be seen by all: what is reported as done has arrived."""
        for device in {memory.device for memory in self.memory.values() if memory.is_cuda}:
            torch.cuda.synchronize(device)

    def run(self, which: Sequence[int], done: Callable[[int], None]) -> None:
        """Make some of the copies."""
        self.inner.pull([self.copies[i] for i in which], self.deadline, lambda i: done(which[i]), self.cancel)

    def find(self, copy: int) -> int | None:
        """The place in this pull of the session's copy of that number; None if it is not one of these."""
        return copy - self.number if 0 <= copy - self.number < len(self.copies) else None


class Fault:
    """Nothing goes wrong. Subclass it, and override what should."""

    def opening(self) -> None:
        """Before a session is opened; may raise."""

    def pull(self, job: Job) -> None:
        """In place of a session's pull."""
        job.run(range(len(job.copies)), job.done)


@frozen
class Unavailable(Fault):
    """No session can be opened."""

    reason: str = "the fault that was asked for"

    def opening(self) -> None:
        """See `Fault.opening`."""
        raise TransportUnavailable(self.reason)


@frozen
class Delay(Fault):
    """Every pull begins so many seconds late."""

    seconds: float

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        _wait(job, time.monotonic() + self.seconds)
        super().pull(job)


@frozen
class StopAfter(Fault):
    """Nothing comes any more once so many bytes have arrived: until the deadline, or until cancelled."""

    nbytes: int

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        which, left = [], self.nbytes
        for i, copy in enumerate(job.copies):
            left -= copy.nbytes
            if left < 0:
                break
            which.append(i)
        job.run(which, job.done)
        if len(which) < len(job.copies):
            _wait(job, float("inf"))


@frozen
class Drop(Fault):
    """One copy is not made; it is reported as done, unless told otherwise."""

    copy: int = 0
    reported: bool = True

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        dropped = job.find(self.copy)
        job.run([i for i in range(len(job.copies)) if i != dropped], job.done)
        if dropped is not None and self.reported:
            job.done(dropped)


class Spoiled(Fault):
    """All copies are made, and something is spoiled before any is reported."""

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        self.before(job)
        arrived: list[int] = []
        try:
            job.run(range(len(job.copies)), arrived.append)
            self.spoil(job)
            job.settle()
        finally:
            for i in arrived:
                job.done(i)

    def before(self, job: Job) -> None:
        """Look at the destination before anything is written."""

    def spoil(self, job: Job) -> None:
        """Change what arrived."""


@frozen
class Flip(Spoiled):
    """One bit of one copy is not what it was."""

    copy: int = 0
    byte: int = 0
    bit: int = 0

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            job.bytes_of(i)[self.byte] ^= 1 << self.bit


@frozen
class LateFlip(Fault):
    """One bit of one copy changes once everything has been reported as done."""

    copy: int = 0
    byte: int = 0
    bit: int = 0

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        super().pull(job)
        if (i := job.find(self.copy)) is not None:
            job.bytes_of(i)[self.byte] ^= 1 << self.bit


@frozen
class SwapWords(Spoiled):
    """Two words within one copy, 8 bytes each, have changed places."""

    copy: int = 0
    first: int = 0
    second: int = 1

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            found = job.bytes_of(i)
            _swap(_behind(found, 8 * self.first, 8)[:8], _behind(found, 8 * self.second, 8)[:8])


@frozen
class SwapCopies(Spoiled):
    """What two copies brought, as far as the shorter one goes, has changed places."""

    first: int = 0
    second: int = 1

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        i, j = job.find(self.first), job.find(self.second)
        if i is not None and j is not None:
            nbytes = min(job.copies[i].nbytes, job.copies[j].nbytes)
            _swap(job.bytes_of(i)[:nbytes], job.bytes_of(j)[:nbytes])


@frozen
class ZeroPage(Spoiled):
    """A page within one copy holds zeros."""

    copy: int = 0
    page: int = 0
    nbytes: int = 4096

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            _behind(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes] = 0


@define
class StalePage(Spoiled):
    """A page within one copy holds what was there before."""

    copy: int = 0
    page: int = 0
    nbytes: int = 4096
    _old: torch.Tensor | None = field(default=None, init=False, repr=False)

    def before(self, job: Job) -> None:
        """See `Spoiled.before`."""
        if (i := job.find(self.copy)) is not None:
            self._old = _behind(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes].clone()

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None and self._old is not None:
            _behind(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes] = self._old


@frozen
class Shift(Spoiled):
    """What one copy brought lies so many bytes too far, round its end."""

    copy: int = 0
    by: int = 1

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            found = job.bytes_of(i)
            if self.by % found.numel() == 0:
                raise ValueError(f"shifted by {self.by}, a copy of {found.numel()} bytes is as it was")
            found.copy_(found.roll(self.by))


class FaultyTransport(Transport):
    """Another transport, under the same name, whose bytes are spoiled on the fork's side after they have arrived.

    Args:
        inner: what does the work.
        fault: what goes wrong; one of this module's, or a `Fault` of your own.
        piece: the longest copy to be asked for, in bytes; as the inner one's, by default.
        memory: reaches the bytes of a region; needed where they are neither in the host's nor in a GPU's.
    """

    def __init__(self, inner: Transport, fault: Fault, *, piece: int | None = None, memory: Reach = bytes_of) -> None:
        self.name = inner.name  # type: ignore[misc]  # a seed knows the inner one by it
        self.piece = inner.piece if piece is None else piece
        self._inner, self._fault, self._memory = inner, fault, memory

    def facts(self, regions: Sequence[Region]) -> Facts:
        """See `Transport.facts`."""
        return self._inner.facts(regions)

    def why_not(self, fork: Facts, seed: Facts) -> str | None:
        """See `Transport.why_not`."""
        return self._inner.why_not(fork, seed)

    def forget(self, regions: Sequence[Region]) -> None:
        """See `Transport.forget`."""
        self._inner.forget(regions)

    def cover(self, regions: Sequence[Region]) -> tuple[Sequence[Region], Sequence[Place]]:
        """See `Transport.cover`."""
        return self._inner.cover(regions)

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        """See `Transport.export`."""
        return self._inner.export(regions, site, fork, deadline)

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> Session:
        """See `Transport.open`."""
        self._fault.opening()
        inner = self._inner.open(offer, host, remote, regions, channel, deadline)
        return _FaultySession(inner, self._fault, {region.id: self._memory(region) for region in regions})


class _FaultySession(Session):
    def __init__(self, inner: Session, fault: Fault, memory: Mapping[int, torch.Tensor]) -> None:
        self.fabric = inner.fabric
        self._inner, self._fault, self._memory, self._number = inner, fault, memory, 0

    def ready(self, deadline: float) -> None:
        self._inner.ready(deadline)

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        job = Job(self._inner, self._memory, copies, deadline, done, cancel, self._number)
        self._number += len(copies)
        self._fault.pull(job)

    def close(self, deadline: float) -> None:
        self._inner.close(deadline)


def _wait(job: Job, until: float) -> None:
    end = min(until, job.deadline)
    if job.cancel.wait(max(0.0, end - time.monotonic())):
        raise TransferFailed("the transfer was cancelled")
    if end == job.deadline:
        raise TransferFailed("nothing more came by the deadline")


def _behind(found: torch.Tensor, start: int, least: int = 1) -> torch.Tensor:
    """What of a copy lies from a place on; a fault that would not happen is an error of whoever wrote it."""
    if start + least > found.numel():
        raise IndexError(f"byte {start + least - 1} is not in a copy of {found.numel()} bytes")
    return found[start:]


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
