"""Faults that a transport can be given on purpose, and the transport that has them."""

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
    """The bytes of a region in host memory or on a CUDA device."""
    if region.device == "cpu":
        return torch.frombuffer((ctypes.c_char * region.nbytes).from_address(region.address), dtype=torch.uint8)
    if region.device.startswith("cuda"):
        return torch.as_tensor(_CudaArray(region), device=region.device)
    raise ValueError(f"give FaultyTransport a memory= that reaches {region.device}")


class _CudaArray:
    """A region in a form from which torch makes a tensor: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, region: Region) -> None:
        place = (region.address, False)
        self.__cuda_array_interface__ = {"shape": (region.nbytes,), "typestr": "|u1", "data": place, "version": 2}


@frozen
class Job:
    """One pull, as a fault gets it: the caller's arguments, and the inner session, which would do it right.

    Attributes:
        memory: the bytes of the fork's regions, by id.
        number: how many copies earlier pulls of the session had.
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
        """Wait until every stream sees the changes to the destinations, as it must before a copy is reported."""
        for device in {memory.device for memory in self.memory.values() if memory.is_cuda}:
            torch.cuda.synchronize(device)

    def run(self, which: Sequence[int], done: Callable[[int], None]) -> None:
        """Make the copies of these indices with the inner session."""
        self.inner.pull([self.copies[i] for i in which], self.deadline, lambda i: done(which[i]), self.cancel)

    def find(self, copy: int) -> int | None:
        """The index in this pull of a copy that is numbered over the whole session; None if it is not in this pull."""
        return copy - self.number if 0 <= copy - self.number < len(self.copies) else None


class Fault:
    """No fault. Subclasses override what should go wrong."""

    def opening(self) -> None:
        """Called before a session is opened; may raise."""

    def pull(self, job: Job) -> None:
        """Called in place of the inner session's pull."""
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
    """Every pull begins `seconds` late."""

    seconds: float

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        _wait_until(job, time.monotonic() + self.seconds)
        super().pull(job)


@frozen
class StopAfter(Fault):
    """After `nbytes` bytes nothing arrives any more, until the deadline or a cancellation."""

    nbytes: int

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        indices, remaining = [], self.nbytes
        for i, copy in enumerate(job.copies):
            remaining -= copy.nbytes
            if remaining < 0:
                break
            indices.append(i)
        job.run(indices, job.done)
        if len(indices) < len(job.copies):
            _wait_until(job, float("inf"))


@frozen
class Drop(Fault):
    """One copy is not made, but is reported as done unless `reported` is False."""

    copy: int = 0
    reported: bool = True

    def pull(self, job: Job) -> None:
        """See `Fault.pull`."""
        dropped = job.find(self.copy)
        job.run([i for i in range(len(job.copies)) if i != dropped], job.done)
        if dropped is not None and self.reported:
            job.done(dropped)


class Spoiled(Fault):
    """All copies are made, and something is changed before any is reported as done."""

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
        """Called before anything is written to the destinations."""

    def spoil(self, job: Job) -> None:
        """Change what has arrived."""


@frozen
class Flip(Spoiled):
    """One bit of one copy is inverted."""

    copy: int = 0
    byte: int = 0
    bit: int = 0

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            job.bytes_of(i)[self.byte] ^= 1 << self.bit


@frozen
class LateFlip(Fault):
    """One bit of one copy is inverted after everything has been reported as done."""

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
    """Two words of one copy, 8 bytes each, are swapped."""

    copy: int = 0
    first: int = 0
    second: int = 1

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            view = job.bytes_of(i)
            _swap(_bytes_from(view, 8 * self.first, 8)[:8], _bytes_from(view, 8 * self.second, 8)[:8])


@frozen
class SwapCopies(Spoiled):
    """The bytes of two copies are swapped, up to the length of the shorter one."""

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
    """A page of one copy, `nbytes` bytes, holds zeros."""

    copy: int = 0
    page: int = 0
    nbytes: int = 4096

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            _bytes_from(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes] = 0


@define
class StalePage(Spoiled):
    """A page of one copy, `nbytes` bytes, holds what was there before the pull."""

    copy: int = 0
    page: int = 0
    nbytes: int = 4096
    _before: torch.Tensor | None = field(default=None, init=False, repr=False)

    def before(self, job: Job) -> None:
        """See `Spoiled.before`."""
        if (i := job.find(self.copy)) is not None:
            self._before = _bytes_from(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes].clone()

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None and self._before is not None:
            _bytes_from(job.bytes_of(i), self.page * self.nbytes)[: self.nbytes] = self._before


@frozen
class Shift(Spoiled):
    """The bytes of one copy are rotated by `by`."""

    copy: int = 0
    by: int = 1

    def spoil(self, job: Job) -> None:
        """See `Spoiled.spoil`."""
        if (i := job.find(self.copy)) is not None:
            view = job.bytes_of(i)
            if self.by % view.numel() == 0:
                raise ValueError(f"shifted by {self.by}, a copy of {view.numel()} bytes does not change")
            view.copy_(view.roll(self.by))


class FaultyTransport(Transport):
    """Another transport, under the same name, with a fault on the fork's side.

    Args:
        inner: the transport that does the work.
        fault: what goes wrong; one of this module's, or a `Fault` of your own.
        piece: the longest copy that it is given, in bytes; that of the inner transport by default.
        memory: returns the bytes of a region as a tensor; needed for memory that is neither on the host nor on a CUDA
            device.
    """

    def __init__(self, inner: Transport, fault: Fault, *, piece: int | None = None, memory: Reach = bytes_of) -> None:
        self.name = inner.name  # type: ignore[misc]  # the seed offers the inner transport by this name
        self.piece = inner.piece if piece is None else piece
        self.rate_limited_by = inner.rate_limited_by  # type: ignore[misc]
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


def _wait_until(job: Job, until: float) -> None:
    """Wait, and raise at the deadline or a cancellation."""
    end = min(until, job.deadline)
    if job.cancel.wait(max(0.0, end - time.monotonic())):
        raise TransferFailed("the transfer was cancelled")
    if end == job.deadline:
        raise TransferFailed("nothing more came by the deadline")


def _bytes_from(view: torch.Tensor, start: int, least: int = 1) -> torch.Tensor:
    """The bytes of a copy from an offset on. Raises `IndexError` for less than `least`: a fault must have an effect."""
    if start + least > view.numel():
        raise IndexError(f"byte {start + least - 1} is not in a copy of {view.numel()} bytes")
    return view[start:]


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    saved = one.clone()
    one.copy_(other)
    other.copy_(saved)
