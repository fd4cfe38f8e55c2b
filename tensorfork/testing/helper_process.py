"""A spawned process that has seeds' sides of leases, or that forks and is killed meanwhile.

Both processes write whole messages to one pipe. ("channel", (lease, bytes)) is a message of a lease's channel. Anything
else from the test is a call of one of `_HelperService`'s methods; ("answer", (succeeded, value)) is its result.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

from attrs import define, field, frozen

from tensorfork import Copy, Facts, TensorForkError, Transport
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.testing.local_seed import SITE, GrantedLease, LeaseEnding, LocalSeed

ANSWER_TIMEOUT = 60.0
"""Seconds after which a helper process that does not answer is taken for dead."""
_FORK_CHANNEL = 1 << 20
"""Number of the channel of a fork in a helper process; seeds' leases there are numbered from 0."""


class HelperProcess:
    """A spawned process that has seeds' sides of leases, for one class of tests. It creates its own transports."""

    def __init__(self, suite: type[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, suite), name="tensorfork-helper", daemon=True)
        self._process.start()
        theirs.close()
        self._answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._channels: dict[int, QueueChannel] = {}
        self._early_messages: dict[int, list[bytes]] = {}
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        self._stopped = False
        self._reader = threading.Thread(target=self._read, name="suite-reader", daemon=True)
        self._reader.start()

    def make_seed(
        self, device: str, sizes: Sequence[int], number: int, published: Sequence[tuple[int, int]] | None = None
    ) -> "RemoteSeed":
        """A seed's side of leases in that process."""
        return RemoteSeed(self, self.call("make_seed", device, list(sizes), number, published))

    def start_fork(self, seed: LocalSeed, device: str, nbytes: int, seconds: float, hang: bool) -> int:
        """Have that process fork a region from a seed in this one. Returns the lease's number at the seed.

        `next_answer` then gives the first difference found, or None. With `hang` it gives "under way" when the first
        copy is done, and the fork goes no further.
        """
        facts = self.call("make_fork", device, nbytes)
        seed_channel = QueueChannel(lambda _: None)
        self.connect(_FORK_CHANNEL, seed_channel)
        granted = seed.grant_lease_on(seed_channel, facts, seconds, True)
        assert self.call("start_pull", granted, seed.number, seconds, hang) is None
        return granted.number

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of that process's `_HelperService`, and wait for its result. Raises its error."""
        self._put(method, args)
        return self.next_answer()

    def next_answer(self) -> Any:
        """The next result. Raises the error that it is, or `TimeoutError`."""
        try:
            succeeded, value = self._answers.get(timeout=ANSWER_TIMEOUT)
        except queue.Empty:
            raise TimeoutError("the helper process does not answer") from None
        if not succeeded:
            raise value if isinstance(value, Exception) else RuntimeError(f"in the helper process: {value}")
        return value

    def connect(self, lease: int, channel: QueueChannel) -> None:
        """Connect this process's end of a lease's channel."""
        channel.connect(lambda message: self._put("channel", (lease, message)))
        with self._lock:
            self._channels[lease] = channel
            early = self._early_messages.pop(lease, [])
        for message in early:
            channel.deliver(message)

    def kill(self) -> None:
        """End the process as a crash would; it is gone when this returns."""
        self._process.kill()
        self._process.join(ANSWER_TIMEOUT)

    def stop(self) -> None:
        """Stop the process (SIGSTOP), as a debugger or a swapping host would; it has stopped when this returns."""
        assert self._process.pid is not None
        self._stopped = True
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Let the process run again after `stop`."""
        assert self._process.pid is not None
        self._stopped = False
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ask the process to exit, and kill it if it does not; it is gone when this returns."""
        if not self._stopped:
            try:
                self._put("exit", ())
                self._process.join(ANSWER_TIMEOUT / 6)
            except OSError:
                pass  # it is dead already
        self.kill()
        self._reader.join(ANSWER_TIMEOUT)
        self._process.close()
        self._pipe.close()

    def _put(self, kind: str, value: Any) -> None:
        with self._write_lock:
            self._pipe.send((kind, value))

    def _read(self) -> None:
        """Distribute what the process writes. Runs on a thread until the process is gone."""
        try:
            while True:
                kind, value = self._pipe.recv()
                if kind == "channel":
                    lease, message = value
                    with self._lock:
                        channel = self._channels.get(lease)
                        if channel is None:
                            self._early_messages.setdefault(lease, []).append(message)
                    if channel is not None:
                        channel.deliver(message)
                else:
                    self._answers.put(value)
        except (EOFError, OSError):
            self._answers.put((False, "it is dead"))
            for channel in list(self._channels.values()):
                channel.end()


@frozen
class RemoteSeed:
    """A seed's side of leases in a helper process; see `SeedSide`."""

    helper_process: HelperProcess
    seed: int

    def facts(self) -> Facts:
        """See `SeedSide`."""
        facts: Facts = self.helper_process.call("facts", self.seed)
        return facts

    def fill(self, number: int) -> None:
        """See `SeedSide`."""
        self.helper_process.call("fill", self.seed, number)

    def unmap(self) -> None:
        """See `SeedSide`."""
        self.helper_process.call("unmap", self.seed)

    def map(self) -> None:
        """See `SeedSide`."""
        self.helper_process.call("map", self.seed)

    def first_difference(self) -> str | None:
        """See `SeedSide`."""
        difference: str | None = self.helper_process.call("first_difference", self.seed)
        return difference

    def grant_lease(self, fork: Facts, seconds: float, serve: bool, fork_channel: QueueChannel) -> GrantedLease:
        """See `SeedSide`."""
        granted: GrantedLease
        lease, granted = self.helper_process.call("grant_lease", self.seed, dict(fork), seconds, serve)
        self.helper_process.connect(lease, fork_channel)
        return granted

    def end_lease(self, number: int, seconds: float) -> LeaseEnding:
        """See `SeedSide`."""
        ending: LeaseEnding = self.helper_process.call("end_lease", self.seed, number, seconds)
        return ending


@define
class _HelperService:
    """What the helper process does when it is called."""

    pipe: Connection
    suite: Any
    seeds: list[LocalSeed] = field(factory=list)
    memory: GuardedMemory | None = None
    transport: Transport = field(init=False)
    channels: dict[int, QueueChannel] = field(factory=dict)
    write_lock: threading.Lock = field(factory=threading.Lock)

    def put(self, kind: str, value: Any) -> None:
        with self.write_lock:
            self.pipe.send((kind, value))

    def make_seed(
        self, device: str, sizes: Sequence[int], number: int, published: Sequence[tuple[int, int]] | None
    ) -> int:
        self.seeds.append(LocalSeed(self.suite.make(), device, sizes, number, published))
        return len(self.seeds) - 1

    def grant_lease(self, seed: int, fork: Mapping[str, Any], seconds: float, serve: bool) -> tuple[int, GrantedLease]:
        lease = len(self.channels)
        channel = self.channels[lease] = QueueChannel(lambda message: self.put("channel", (lease, message)))
        return lease, self.seeds[seed].grant_lease_on(channel, fork, seconds, serve)

    def deliver(self, lease: int, message: bytes) -> None:
        self.channels[lease].deliver(message)

    def facts(self, seed: int) -> Facts:
        return self.seeds[seed].facts()

    def fill(self, seed: int, number: int) -> None:
        self.seeds[seed].fill(number)

    def unmap(self, seed: int) -> None:
        self.seeds[seed].unmap()

    def map(self, seed: int) -> None:
        self.seeds[seed].map()

    def first_difference(self, seed: int) -> str | None:
        return self.seeds[seed].first_difference()

    def end_lease(self, seed: int, number: int, seconds: float) -> LeaseEnding:
        return self.seeds[seed].end_lease(number, seconds)

    def make_fork(self, device: str, nbytes: int) -> Facts:
        """Allocate a fork's memory, create its transport, and return the facts."""
        self.memory = GuardedMemory(device, [nbytes], 77)
        self.transport = self.suite.make()
        return dict(self.transport.facts(self.memory.regions))

    def start_pull(self, granted: GrantedLease, number: int, seconds: float, hang: bool) -> None:
        """Open and pull on a thread, which puts another answer when it has ended."""
        self.channels[_FORK_CHANNEL] = QueueChannel(lambda message: self.put("channel", (_FORK_CHANNEL, message)))
        threading.Thread(target=self._pull, args=(granted, number, seconds, hang), daemon=True).start()

    def _pull(self, granted: GrantedLease, number: int, seconds: float, hang: bool) -> None:
        assert self.memory is not None
        deadline = time.monotonic() + seconds
        nbytes = self.memory.sizes[0]
        try:
            regions, places = self.transport.cover(self.memory.regions)
            channel = self.channels[_FORK_CHANNEL]
            channel.seed = granted.seed
            session = self.transport.open(granted.offer, SITE.host, granted.remote, regions, channel, deadline)
            theirs, ours, step = granted.places[0], places[0], -(-nbytes // 64)
            copies = [
                Copy(0, theirs.region, theirs.offset + at, ours.region, ours.offset + at, min(step, nbytes - at))
                for at in range(0, nbytes, step)
            ]

            def done(_: int) -> None:
                if hang:
                    self.put("answer", (True, "under way"))
                    Event().wait()

            session.pull(copies, deadline, done, Event())
            session.close(deadline)
            self.memory.expect(0, 0, contents(number, [nbytes])[0])
            self.put("answer", (True, self.memory.first_difference()))
        except BaseException:
            self.put("answer", (False, traceback.format_exc()))


def _main(pipe: Connection, suite: type[Any]) -> None:
    service = _HelperService(pipe, suite())
    try:
        while True:
            kind, args = pipe.recv()
            if kind == "exit":
                return
            if kind == "channel":
                service.deliver(*args)
                continue
            try:
                service.put("answer", (True, getattr(service, kind)(*args)))
            except TensorForkError as error:
                service.put("answer", (False, error))
            except BaseException:
                service.put("answer", (False, traceback.format_exc()))
    except (EOFError, OSError):
        return  # the tests have ended
