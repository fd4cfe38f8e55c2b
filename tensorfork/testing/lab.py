"""What the suite's tests are written with: leases on known bytes, and pulls that are looked at closely."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import pytest
from attrs import define, field, frozen

from tensorfork import Copy, Place, Region, Session, TransferFailed, Transport
from tensorfork.testing.ends import SITE, Ending, LocalSeed, Offer, SeedEnd, Speaker
from tensorfork.testing.helper import Helper
from tensorfork.testing.memory import Memory, contents

MARGIN = 5
"""How many times longer than promised anything may take before a test calls it late."""
HERE, SPAWNED = "within one process", "from a spawned process"


class Suite(Protocol):
    """What is needed of a `TransportSuite`."""

    @property
    def seconds(self) -> float:
        """A deadline within which any pull here is made."""

    def make(self) -> Transport:
        """A new transport."""


@frozen
class Setup:
    """Where the seed is, and on which devices the two sides have their memory."""

    way: str
    seed: str
    fork: str

    def __str__(self) -> str:
        pair = "" if (self.seed, self.fork) == ("cpu", "cpu") else f" {self.seed} to {self.fork}"
        return f"{self.way}{pair}"


@frozen
class Move:
    """A copy, as tests say it: bytes from an offset in the seed's region of some index into ours."""

    source: int
    offset: int
    into: int
    at: int
    nbytes: int


class Once:
    """Does something when it is first called, and not again."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do, self.called = do, False

    def __call__(self, _: int) -> None:
        """Takes and ignores what `done` gets."""
        if not self.called:
            self.called = True
            self._do()


def run_together(*work: Callable[[], None]) -> None:
    """Each on a thread; raises the first error of any."""
    errors: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


class Lab:
    """Makes seeds' ends and leases, and ends what it made."""

    def __init__(self, suite: "Suite", setup: Setup, helper: Helper | None) -> None:
        self.suite, self.setup, self._helper = suite, setup, helper
        self._stack = ExitStack()
        self._numbers = iter(range(1, 1_000_000))

    def __enter__(self) -> "Lab":
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def seed(self, sizes: Sequence[int], number: int | None = None) -> SeedEnd:
        """A seed's end with regions of these sizes."""
        number = next(self._numbers) if number is None else number
        if self._helper is not None:
            return self._helper.seed(self.setup.seed, sizes, number)
        return LocalSeed(self.suite.make(), self.setup.seed, sizes, number)

    @contextmanager
    def own_process(self) -> Iterator[Helper]:
        """From here, the seed is in a process of this test's own, for it to ill-treat."""
        shared, self._helper = self._helper, Helper(type(self.suite))
        try:
            yield self._helper
        finally:
            self._helper.close()
            self._helper = shared

    @contextmanager
    def lease(
        self,
        theirs: Sequence[int],
        ours: Sequence[int],
        *,
        like: "Lease | None" = None,
        serve: bool = True,
        seconds: float | None = None,
        gone: bool = False,
    ) -> Iterator["Lease"]:
        """A lease on regions of the sizes `theirs` (or on those of the lease it is `like`), open for a fork with
        regions of the sizes `ours`.

        Served unless told otherwise; `gone` says that at its end there will be no seed.
        """
        seconds = self.suite.seconds if seconds is None else seconds
        number = next(self._numbers)
        seed = self.seed(theirs, number) if like is None else like.seed
        expected = contents(number, theirs) if like is None else like.expected
        transport = self.suite.make()
        memory = Memory(self.setup.fork, ours, next(self._numbers))
        facts = dict(transport.facts(memory.regions))
        assert transport.why_not(facts, seed.facts()) is None
        offer, speaker = seed.export(facts, seconds, serve, Speaker(lambda _: None))
        lease = Lease(self.suite, seed, offer, memory, expected, transport.piece, next(self._numbers))
        try:
            regions, places = transport.cover(memory.regions)
            lease.ours, lease.covers = places, regions
            lease.session = transport.open(
                offer.offer, SITE.host, offer.remote, regions, speaker, time.monotonic() + seconds
            )
            try:
                lease.session.ready(time.monotonic() + seconds)
                yield lease
            finally:
                lease.session.close(time.monotonic() + seconds)
        finally:
            if not gone and not lease.ended:
                lease.end_at_the_seed()
        assert memory.wrong(but=lease.undrained) is None

    def check(self, ending: Ending) -> None:
        """Fail unless a lease ended as it should."""
        assert ending.error is None, f"serve failed:\n{ending.error}"
        assert ending.ended, "serve did not return when the lease ended"


@define(eq=False)
class Lease:
    """An open lease, and what must be where."""

    suite: Suite
    seed: SeedEnd
    offer: Offer
    memory: Memory
    expected: list[Any]
    piece: int
    number: int
    ended: bool = False
    ours: Sequence[Place] = ()
    covers: Sequence[Region] = ()
    undrained: list[tuple[int, int]] = field(factory=list)
    session: Session = field(init=False)

    @property
    def theirs(self) -> Sequence[Place]:
        """Where each of the seed's regions begins in what it exported."""
        return self.offer.places

    def remote_end(self, index: int) -> int:
        """Where what the seed exported with this region in it ends."""
        return next(remote.nbytes for remote in self.offer.remote if remote.id == self.theirs[index].region)

    def our_end(self, index: int) -> int:
        """Where what we gave the transport with this region in it ends."""
        return next(region.nbytes for region in self.covers if region.id == self.ours[index].region)

    def stripes(self, count: int) -> list[Move]:
        """The seed's first region into our first, in so many copies."""
        nbytes = min(self.memory.sizes[0], self.expected[0].numel())
        step = -(-nbytes // count)
        return [Move(0, at, 0, at, min(step, nbytes - at)) for at in range(0, nbytes, step)]

    def copy(self, move: Move) -> Copy:
        """As a transport is told it."""
        source, into = self.theirs[move.source], self.ours[move.into]
        return Copy(0, source.region, source.offset + move.offset, into.region, into.offset + move.at, move.nbytes)

    def pull(self, moves: Sequence[Move]) -> None:
        """Pull, and see that everything is as it should be."""
        moves = [part for move in moves for part in self._pieces(move)]
        done = self.attempt(moves)
        assert sorted(done) == list(range(len(moves))), "done was not called exactly once for each copy"
        assert self.memory.wrong() is None
        assert self.seed.wrong() is None

    def fail(
        self,
        moves: Sequence[Move],
        *,
        cancel: threading.Event | None = None,
        then: Callable[[int], None] = lambda _: None,
        seconds: float | None = None,
    ) -> TransferFailed:
        """Pull, and see that it fails, in time, and writes nothing afterwards."""
        with pytest.raises(TransferFailed) as caught:
            self.attempt(moves, cancel=cancel, then=then, seconds=seconds)
        self.undrained += caught.value.undrained
        self.poison()
        return caught.value

    def fail_raw(self, copies: Sequence[Copy], good: Sequence[Move | None] = ()) -> None:
        """Pull copies as they are; see that the pull fails."""
        with pytest.raises(TransferFailed) as caught:
            self.attempt(good or [None] * len(copies), raw=copies)
        self.undrained += caught.value.undrained
        if not good:
            assert self.memory.wrong(but=self.undrained) is None
        self.poison()

    def attempt(
        self,
        moves: Sequence[Move | None],
        *,
        cancel: threading.Event | None = None,
        then: Callable[[int], None] = lambda _: None,
        seconds: float | None = None,
        raw: Sequence[Copy] | None = None,
    ) -> list[int]:
        """Pull, looking at each copy when it is done."""
        caller = threading.get_ident()
        done: list[int] = []
        seen: set[int] = set()
        seconds = self.suite.seconds if seconds is None else seconds
        late = time.monotonic() + MARGIN * (max(seconds, 0) + 1)
        deadline = time.monotonic() + seconds

        def arrived(i: int) -> None:
            assert threading.get_ident() == caller, "done was called on another thread"
            assert i not in seen, f"done was called twice for copy {i}"
            move = moves[i]
            assert move is not None, "a copy that cannot be made was reported as done"
            wanted = self.expected[move.source][move.offset : move.offset + move.nbytes]
            assert self.memory.read(move.into, move.at, move.nbytes).cpu().equal(wanted), "done before it is there"
            self.memory.want(move.into, move.at, wanted)
            seen.add(i)
            done.append(i)
            then(i)

        copies = [self.copy(move) for move in moves if move is not None] if raw is None else raw
        try:
            self.session.pull(copies, deadline, arrived, threading.Event() if cancel is None else cancel)
        except BaseException:
            self.poison()
            raise
        finally:
            assert time.monotonic() < late, "it ended long after its deadline"
        return done

    def poison(self) -> None:
        """Change every byte of our memory: whatever is written from now on shows."""
        self.memory.poison()

    def change_the_seed(self) -> None:
        """New contents of the seed's regions."""
        self.number += 1
        self.seed.fill(self.number)
        self.expected = contents(self.number, [old.numel() for old in self.expected])

    def end_at_the_seed(self) -> None:
        """The seed ends the lease."""
        self.ended = True
        ending = self.seed.end(self.offer.number, self.suite.seconds)
        assert ending.error is None, f"serve failed:\n{ending.error}"
        assert ending.ended, "serve did not return when the lease ended"
        assert self.seed.wrong() is None

    def _pieces(self, move: Move) -> Iterator[Move]:
        for start in range(0, move.nbytes, self.piece):
            nbytes = min(self.piece, move.nbytes - start)
            yield Move(move.source, move.offset + start, move.into, move.at + start, nbytes)
