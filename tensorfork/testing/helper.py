"""A process of its own, which holds seeds' ends, or is a fork that comes to harm.

Both sides write whole messages to one pipe: ("say", (lease, bytes)) for a channel; everything else is a call of one of
`_Host`'s methods, and its answer.
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
from tensorfork.testing.ends import SITE, Ending, LocalSeed, Offer, Speaker
from tensorfork.testing.memory import Memory, contents

PATIENCE = 60.0
"""Seconds after which a helper process that says nothing is taken for dead."""
_FORK = 1 << 20
"""Number of the channel of a fork in a helper process."""


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
        self._stopped = False
        self._reader = threading.Thread(target=self._read, name="suite-reader", daemon=True)
        self._reader.start()

    def seed(self, device: str, sizes: Sequence[int], number: int) -> "RemoteSeed":
        """A seed's end in that process."""
        return RemoteSeed(self, self.call("make", device, list(sizes), number))

    def fork(self, seed: LocalSeed, device: str, nbytes: int, seconds: float, hold: bool) -> int:
        """Have that process fork a region from a seed's end in this one; the lease's number at the seed.

        The answer (`hear`) comes when all is done: what is wrong, or None. With `hold` it is "under way", when the
        first copy is done, and then nothing goes on.
        """
        facts = self.call("target", device, nbytes)
        speaker = Speaker(lambda _: None)
        self.listen(_FORK, speaker)
        offer = seed.grant(facts, seconds, True, speaker)
        assert self.call("pull", offer, seed.number, seconds, hold) is None
        return offer.number

    def call(self, what: str, *args: Any) -> Any:
        """Have something done there, and wait for it."""
        self._put(what, args)
        return self.hear()

    def hear(self) -> Any:
        """The next answer."""
        try:
            fine, answer = self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError("the helper process does not answer") from None
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
        self._stopped = True
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """Let it run again after `stop`."""
        assert self._process.pid is not None
        self._stopped = False
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Let it end; it is gone when this returns."""
        if not self._stopped:
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
    memory: Memory | None = None
    transport: Transport = field(init=False)
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

    def target(self, device: str, nbytes: int) -> Facts:
        """Make memory for a fork's end."""
        self.memory = Memory(device, [nbytes], 77)
        self.transport = self.suite.make()
        return dict(self.transport.facts(self.memory.regions))

    def pull(self, offer: Offer, number: int, seconds: float, hold: bool) -> None:
        """Fork, on a thread, which answers once more."""
        self.speakers[_FORK] = Speaker(lambda message: self.put("say", (_FORK, message)))
        threading.Thread(target=self._pull, args=(offer, number, seconds, hold), daemon=True).start()

    def _pull(self, offer: Offer, number: int, seconds: float, hold: bool) -> None:
        assert self.memory is not None
        deadline = time.monotonic() + seconds
        nbytes = self.memory.sizes[0]
        try:
            regions, places = self.transport.cover(self.memory.regions)
            session = self.transport.open(offer.offer, SITE.host, offer.remote, regions, self.speakers[_FORK], deadline)
            theirs, ours, step = offer.places[0], places[0], -(-nbytes // 64)
            copies = [
                Copy(0, theirs.region, theirs.offset + at, ours.region, ours.offset + at, min(step, nbytes - at))
                for at in range(0, nbytes, step)
            ]

            def done(_: int) -> None:
                if hold:
                    self.put("answer", (True, "under way"))
                    Event().wait()

            session.pull(copies, deadline, done, Event())
            session.close(deadline)
            self.memory.want(0, 0, contents(number, [nbytes])[0])
            self.put("answer", (True, self.memory.wrong()))
        except BaseException:
            self.put("answer", (False, traceback.format_exc()))


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
