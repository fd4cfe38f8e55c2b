"""Both ends of a lease without a model, a bootstrap or a seed: memory of known bytes, channels, and a seed's end that
runs here or in a process of its own.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from tensorfork import Export, Facts, PeerUnreachable, Place, Region, RemoteRegion, Site, TensorForkError, Transport

PATIENCE = 60.0
"""Seconds after which a helper process that says nothing is taken for dead."""
_FRONTS = (61, 512, 4096, 3)
_BACK = 67


def pattern(number: int, nbytes: int) -> torch.Tensor:
    """Pseudo-random bytes in host memory: the same for the same number, in every process."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-nbytes // 8),), dtype=torch.int64, generator=generator)
    return words.view(torch.uint8)[:nbytes]


def contents(number: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """What the regions of a `Memory` of these sizes and this number hold."""
    return [pattern(1000 * number + i, nbytes) for i, nbytes in enumerate(sizes)]


class Memory:
    """Regions of known bytes on a device, each with known bytes on both sides; most begin at odd addresses.

    `wanted` is what every byte should be; whoever lets something be written says so there.
    """

    def __init__(self, device: str, sizes: Sequence[int], number: int) -> None:
        self.device, self.sizes = device, list(sizes)
        self._fronts = [_FRONTS[i % len(_FRONTS)] for i in range(len(self.sizes))]
        self._wanted = [
            pattern(10_000_000 + i, front + nbytes + _BACK)
            for i, (front, nbytes) in enumerate(zip(self._fronts, self.sizes, strict=True))
        ]
        self._buffers = [torch.empty(wanted.numel(), dtype=torch.uint8, device=device) for wanted in self._wanted]
        for buffer, wanted in zip(self._buffers, self._wanted, strict=True):
            buffer.copy_(wanted)
        self.fill(number)

    def fill(self, number: int) -> None:
        """Put `contents(number)` into the regions, and have it there when this returns."""
        for i, new in enumerate(contents(number, self.sizes)):
            self.want(i, 0, new)
            self.read(i, 0, self.sizes[i], self._buffers).copy_(new)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def poison(self) -> None:
        """Make every byte of the regions another one: whatever is written from now on shows."""
        for i, nbytes in enumerate(self.sizes):
            self.read(i, 0, nbytes, self._wanted).bitwise_not_()
            self.read(i, 0, nbytes, self._buffers).copy_(self.read(i, 0, nbytes, self._wanted))
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    @property
    def regions(self) -> list[Region]:
        """One for each size; the ids are neither dense nor in order."""
        return [
            Region(self.id(i), buffer.data_ptr() + front, nbytes, self.device, buffer)
            for i, (buffer, front, nbytes) in enumerate(zip(self._buffers, self._fronts, self.sizes, strict=True))
        ]

    def id(self, index: int) -> int:
        """The id of a region."""
        return 7 + (index ^ 1) * 3

    def want(self, index: int, at: int, new: torch.Tensor) -> None:
        """From now on, these bytes are to be at this place."""
        self.read(index, at, new.numel(), self._wanted).copy_(new)

    def read(self, index: int, at: int, nbytes: int, where: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """A view of some bytes of a region."""
        start = self._fronts[index] + at
        return (self._buffers if where is None else where)[index][start : start + nbytes]

    def wrong(self, but: Sequence[tuple[int, int]] = ()) -> str | None:
        """In words, the first byte that is not what it should be; None if all are. `but` are stretches, as (address,
        bytes), that are not looked at.
        """
        for i, (buffer, wanted) in enumerate(zip(self._buffers, self._wanted, strict=True)):
            have = buffer.cpu()
            if torch.equal(have, wanted):
                continue
            differ = have != wanted
            for address, nbytes in but:
                start = address - buffer.data_ptr()
                differ[max(0, start) : max(0, start + nbytes)] = False
            if differ.any():
                at = int(differ.nonzero()[0])
                where = f"byte {at - self._fronts[i]:,} of region {i} ({self.sizes[i]:,} bytes)"
                return f"{where} is {int(have[at])}, not {int(wanted[at])}; {int(differ.sum()):,} bytes differ in it"
        return None


class Speaker:
    """One end of a lease's channel, as the bootstrap would make it: what the other end says is put in with `hear`."""

    def __init__(self, say: Callable[[bytes], None]) -> None:
        self._say = say
        self._box: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def send(self, message: bytes, deadline: float) -> None:
        """See `tensorfork.Channel`."""
        if len(message) > 1 << 20:
            raise ValueError("a message on a channel has at most 1 MiB")
        try:
            self._say(bytes(message))
        except OSError as error:
            raise PeerUnreachable(f"the other side is gone: {error}") from error

    def recv(self, deadline: float) -> bytes:
        """See `tensorfork.Channel`."""
        try:
            message = self._box.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnreachable("nothing came on the channel by the deadline") from None
        if message is None:
            self._box.put(None)
            raise PeerUnreachable("the lease has ended")
        return message

    def hear(self, message: bytes) -> None:
        """Put in what the other end says."""
        self._box.put(message)

    def end(self) -> None:
        """The lease has ended: whoever waits is woken."""
        self._box.put(None)


@frozen
class Offer:
    """What a fork is told of a lease."""

    number: int
    offer: bytes
    remote: Sequence[RemoteRegion]
    places: Sequence[Place]


@frozen
class Ending:
    """How a lease ended, at the seed: what `Export.close` said, and whether `Export.serve` returned, and how."""

    closed: bool
    ended: bool
    error: str | None


@define
class _Served:
    export: Export
    speaker: Speaker
    thread: threading.Thread | None
    error: str | None = None


class SeedEnd(Protocol):
    """A seed's end of leases: here, or in another process."""

    def facts(self) -> Facts:
        """What the seed would say in its welcome."""

    def fill(self, number: int) -> None:
        """Change the contents of all regions."""

    def wrong(self) -> str | None:
        """See `Memory.wrong`."""

    def export(self, fork: Facts, seconds: float, serve: bool, fork_speaker: Speaker) -> tuple[Offer, Speaker]:
        """Grant a lease, as a seed does: cover, export, and serve on a thread. Also the fork's end of its channel."""

    def end(self, number: int, seconds: float) -> Ending:
        """End a lease, as a seed does."""


class LocalSeed:
    """A seed's end, in this process."""

    def __init__(self, transport: Transport, device: str, sizes: Sequence[int], number: int) -> None:
        self._transport = transport
        self._memory = Memory(device, sizes, number)
        self._served: dict[int, _Served] = {}

    def facts(self) -> Facts:
        """What the seed would say in its welcome."""
        return dict(self._transport.facts(self._memory.regions))

    def fill(self, number: int) -> None:
        """Change the contents of all regions."""
        self._memory.fill(number)

    def wrong(self) -> str | None:
        """See `Memory.wrong`."""
        return self._memory.wrong()

    def export(self, fork: Facts, seconds: float, serve: bool, fork_speaker: Speaker) -> tuple[Offer, Speaker]:
        """Grant a lease, as a seed does: cover, export, and serve on a thread. Also the fork's end of its channel."""
        mine = Speaker(fork_speaker.hear)
        fork_speaker._say = mine.hear
        return self.grant(fork, seconds, serve, mine), fork_speaker

    def grant(self, fork: Facts, seconds: float, serve: bool, speaker: Speaker) -> Offer:
        """The same, with a channel that is there already."""
        regions, places = self._transport.cover(self._memory.regions)
        site = Site("127.0.0.1", "127.0.0.1")
        export = self._transport.export(regions, site, fork, time.monotonic() + seconds)
        number = len(self._served)
        served = self._served[number] = _Served(export, speaker, None)
        remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in regions]
        if serve:
            served.thread = threading.Thread(target=_serve, args=(served,), name="suite-serve", daemon=True)
            served.thread.start()
        return Offer(number, bytes(export.offer), remote, list(places))

    def end(self, number: int, seconds: float) -> Ending:
        """End a lease, as a seed does."""
        served = self._served[number]
        served.speaker.end()
        closed = served.export.close(time.monotonic() + seconds)
        if served.thread is None:  # serving only begins: it must see that it is over
            served.thread = threading.Thread(target=_serve, args=(served,), name="suite-serve", daemon=True)
            served.thread.start()
        served.thread.join(seconds)
        return Ending(closed, not served.thread.is_alive(), served.error)


def _serve(served: _Served) -> None:
    try:
        served.export.serve(served.speaker)
    except PeerUnreachable:
        pass  # said by the channel when the fork is gone or the lease has ended; a seed takes that for the end too
    except BaseException:
        served.error = traceback.format_exc()


# A process of its own. Both sides write whole messages to one pipe: ("say", lease, bytes) for a channel, everything
# else is a call of a method and its answer.


class Helper:
    """A process that holds seeds' ends, made from the suite's class: it makes transports of its own."""

    def __init__(self, suite: type[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_help, args=(theirs, suite), name="tensorfork-helper", daemon=True)
        self._process.start()
        theirs.close()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._speakers: dict[int, Speaker] = {}
        self._unclaimed: dict[int, list[bytes]] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._reader = threading.Thread(target=self._read, name="suite-reader", daemon=True)
        self._reader.start()

    def seed(self, device: str, sizes: Sequence[int], number: int) -> "RemoteSeed":
        """A seed's end in that process."""
        return RemoteSeed(self, self.call("make", device, list(sizes), number))

    def call(self, what: str, *args: Any) -> Any:
        """Have something done there, and wait for it."""
        self._put(what, args)
        try:
            fine, answer = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"the helper process did not answer to {what!r}") from None
        if not fine:
            raise answer if isinstance(answer, Exception) else RuntimeError(f"in the helper process: {answer}")
        return answer

    def listen(self, lease: int, speaker: Speaker) -> None:
        """Connect the fork's end of a lease's channel."""
        speaker._say = lambda message: self._put("say", (lease, message))
        with self._lock:
            self._speakers[lease] = speaker
            early = self._unclaimed.pop(lease, [])
        for message in early:
            speaker.hear(message)

    def kill(self) -> None:
        """End it as a crash would, and have it gone when this returns."""
        self._process.kill()
        self._process.join(PATIENCE)

    def stop(self) -> None:
        """Stop it, as a debugger or a swapping host would, and have it stopped when this returns."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """Let it run again after `stop`."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Let it end; it is gone when this returns."""
        try:
            self._put("exit", ())
            self._process.join(PATIENCE / 6)
        except OSError:
            pass  # it is dead already
        self.kill()
        self._reader.join(PATIENCE)
        self._process.close()
        self._pipe.close()

    def _put(self, what: str, value: Any) -> None:
        with self._writing:
            self._pipe.send((what, value))

    def _read(self) -> None:
        try:
            while True:
                what, value = self._pipe.recv()
                if what == "say":
                    lease, message = value
                    with self._lock:
                        speaker = self._speakers.get(lease)
                        if speaker is None:
                            self._unclaimed.setdefault(lease, []).append(message)
                    if speaker is not None:
                        speaker.hear(message)
                else:
                    self._answers.put(value)
        except (EOFError, OSError):
            self._answers.put((False, "it is dead"))
            for speaker in list(self._speakers.values()):
                speaker.end()


@frozen
class RemoteSeed:
    """A seed's end, in a helper process."""

    helper: Helper
    seed: int

    def facts(self) -> Facts:
        """See `LocalSeed`."""
        found: Facts = self.helper.call("facts", self.seed)
        return found

    def fill(self, number: int) -> None:
        """See `LocalSeed`."""
        self.helper.call("fill", self.seed, number)

    def wrong(self) -> str | None:
        """See `LocalSeed`."""
        found: str | None = self.helper.call("wrong", self.seed)
        return found

    def export(self, fork: Facts, seconds: float, serve: bool, fork_speaker: Speaker) -> tuple[Offer, Speaker]:
        """See `LocalSeed`."""
        lease, offer = self.helper.call("export", self.seed, dict(fork), seconds, serve)
        self.helper.listen(lease, fork_speaker)
        return offer, fork_speaker

    def end(self, number: int, seconds: float) -> Ending:
        """See `LocalSeed`."""
        ending: Ending = self.helper.call("end", self.seed, number, seconds)
        return ending


@define
class _Host:
    """What runs in the helper process."""

    pipe: Connection
    suite: Any
    seeds: list[LocalSeed] = field(factory=list)
    speakers: dict[int, Speaker] = field(factory=dict)
    writing: threading.Lock = field(factory=threading.Lock)

    def put(self, what: str, value: Any) -> None:
        with self.writing:
            self.pipe.send((what, value))

    def make(self, device: str, sizes: Sequence[int], number: int) -> int:
        self.seeds.append(LocalSeed(self.suite.make(), device, sizes, number))
        return len(self.seeds) - 1

    def export(self, seed: int, fork: Mapping[str, Any], seconds: float, serve: bool) -> tuple[int, Offer]:
        lease = len(self.speakers)
        speaker = self.speakers[lease] = Speaker(lambda message: self.put("say", (lease, message)))
        return lease, self.seeds[seed].grant(fork, seconds, serve, speaker)

    def say(self, lease: int, message: bytes) -> None:
        self.speakers[lease].hear(message)

    def facts(self, seed: int) -> Facts:
        return self.seeds[seed].facts()

    def fill(self, seed: int, number: int) -> None:
        self.seeds[seed].fill(number)

    def wrong(self, seed: int) -> str | None:
        return self.seeds[seed].wrong()

    def end(self, seed: int, number: int, seconds: float) -> Ending:
        return self.seeds[seed].end(number, seconds)


def _help(pipe: Connection, suite: type[Any]) -> None:
    host = _Host(pipe, suite())
    try:
        while True:
            what, args = pipe.recv()
            if what == "exit":
                return
            if what == "say":
                host.say(*args)
                continue
            try:
                host.put("answer", (True, getattr(host, what)(*args)))
            except TensorForkError as error:
                host.put("answer", (False, error))
            except BaseException:
                host.put("answer", (False, traceback.format_exc()))
    except (EOFError, OSError):
        return  # the test is over
