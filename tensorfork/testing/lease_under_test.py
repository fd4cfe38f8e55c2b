"""An open lease of the suite: it pulls, and checks everything that every pull must keep."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from attrs import define, field, frozen

from tensorfork import Copy, Place, Region, Session, TransferFailed
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.testing.local_seed import GrantedLease, SeedSide

TIME_TOLERANCE = 5
"""How many times longer than promised anything may take before a test calls it late."""


@frozen
class CopySpec:
    """A copy, by the indices of regions: `nbytes` bytes from `offset` in the seed's region `source` to `at` in the
    fork's region `into`.
    """

    source: int
    offset: int
    into: int
    at: int
    nbytes: int


class CallOnce:
    """A callback for `done` that calls a function the first time, and not again."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function, self.called = function, False

    def __call__(self, _: int) -> None:
        """Call the function; the copy's index is ignored."""
        if not self.called:
            self.called = True
            self._function()


def run_in_threads(*functions: Callable[[], None]) -> None:
    """Call each function on a thread of its own, wait for all, and raise the first error."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@define(eq=False)
class LeaseUnderTest:
    """An open lease, and what should be in the memory of both sides.

    Attributes:
        seconds: the suite's usual deadline of a pull.
        memory: the fork's.
        expected: the contents of the seed's regions.
        piece: the transport's.
        number: that of the seed's contents.
        ended: whether the seed has ended the lease.
        fork_places: where each of the fork's regions begins in the transport's.
        fork_regions: the regions that the transport was given.
        undrained: memory that may still be written after a failure, as (address, bytes).
    """

    seconds: float
    seed: SeedSide
    granted: GrantedLease
    memory: GuardedMemory
    expected: list[Any]
    piece: int
    number: int
    ended: bool = False
    fork_places: Sequence[Place] = ()
    fork_regions: Sequence[Region] = ()
    undrained: list[tuple[int, int]] = field(factory=list)
    session: Session = field(init=False)

    @property
    def seed_places(self) -> Sequence[Place]:
        """Where each of the seed's regions begins in what it exported."""
        return self.granted.places

    def seed_region_size(self, index: int) -> int:
        """The size of the exported region that holds the seed's region of this index."""
        return next(remote.nbytes for remote in self.granted.remote if remote.id == self.seed_places[index].region)

    def fork_region_size(self, index: int) -> int:
        """The size of the transport's region that holds the fork's region of this index."""
        return next(region.nbytes for region in self.fork_regions if region.id == self.fork_places[index].region)

    def stripes(self, count: int) -> list[CopySpec]:
        """The seed's first region into the fork's first, in `count` copies."""
        nbytes = min(self.memory.sizes[0], self.expected[0].numel())
        step = -(-nbytes // count)
        return [CopySpec(0, at, 0, at, min(step, nbytes - at)) for at in range(0, nbytes, step)]

    def copy(self, spec: CopySpec) -> Copy:
        """The copy in the transport's terms."""
        source, into = self.seed_places[spec.source], self.fork_places[spec.into]
        return Copy(0, source.region, source.offset + spec.offset, into.region, into.offset + spec.at, spec.nbytes)

    def pull(self, specs: Sequence[CopySpec]) -> None:
        """Pull, and check that every byte of both sides is as it should be."""
        specs = [piece for spec in specs for piece in self._pieces(spec)]
        done = self.try_pull(specs)
        assert sorted(done) == list(range(len(specs))), "done was not called exactly once for each copy"
        assert self.memory.first_difference() is None
        assert self.seed.first_difference() is None

    def fail(
        self,
        specs: Sequence[CopySpec],
        *,
        cancel: threading.Event | None = None,
        then: Callable[[int], None] = lambda _: None,
        seconds: float | None = None,
    ) -> TransferFailed:
        """Pull, and check that it fails in time, and that nothing is written afterwards. Returns the error."""
        with pytest.raises(TransferFailed) as caught:
            self.try_pull(specs, cancel=cancel, then=then, seconds=seconds)
        self.undrained += caught.value.undrained
        self.poison()
        return caught.value

    def fail_raw(self, copies: Sequence[Copy], specs: Sequence[CopySpec | None] = ()) -> None:
        """Pull `copies`, and check that it fails. `specs` has None for those that must be refused; by default, all."""
        with pytest.raises(TransferFailed) as caught:
            self.try_pull(specs or [None] * len(copies), raw=copies)
        self.undrained += caught.value.undrained
        if not specs:
            assert self.memory.first_difference(ignore=self.undrained) is None
        self.poison()

    def try_pull(
        self,
        specs: Sequence[CopySpec | None],
        *,
        cancel: threading.Event | None = None,
        then: Callable[[int], None] = lambda _: None,
        seconds: float | None = None,
        raw: Sequence[Copy] | None = None,
    ) -> list[int]:
        """Pull, and check each copy when it is done, before `then(i)` is called. Returns their indices in order."""
        caller = threading.get_ident()
        done: list[int] = []
        seconds = self.seconds if seconds is None else seconds
        late = time.monotonic() + TIME_TOLERANCE * (max(seconds, 0) + 1)
        deadline = time.monotonic() + seconds

        def arrived(i: int) -> None:
            assert threading.get_ident() == caller, "done was called on another thread"
            assert i not in seen, f"done was called twice for copy {i}"
            spec = specs[i]
            assert spec is not None, "a copy that cannot be made was reported as done"
            expected = self.expected[spec.source][spec.offset : spec.offset + spec.nbytes]
            assert self.memory.view(spec.into, spec.at, spec.nbytes).cpu().equal(expected), "done before it is there"
            self.memory.expect(spec.into, spec.at, expected)
            seen.add(i)
            done.append(i)
            then(i)

        seen: set[int] = set()
        copies = [self.copy(spec) for spec in specs if spec is not None] if raw is None else raw
        try:
            self.session.pull(copies, deadline, arrived, threading.Event() if cancel is None else cancel)
        except BaseException:
            self.poison()
            raise
        finally:
            assert time.monotonic() < late, "it ended long after its deadline"
        return done

    def poison(self) -> None:
        """Change every byte of the fork's memory, so that any later write shows."""
        self.memory.poison()

    def refill_seed(self) -> None:
        """Give the seed's regions new contents."""
        self.number += 1
        self.seed.fill(self.number)
        self.expected = contents(self.number, [old.numel() for old in self.expected])

    def end_at_seed(self) -> None:
        """End the lease at the seed, and check that `serve` returns and the seed's memory has not changed."""
        self.ended = True
        ending = self.seed.end_lease(self.granted.number, self.seconds)
        assert ending.serve_error is None, f"serve failed:\n{ending.serve_error}"
        assert ending.serve_returned, "serve did not return when the lease ended"
        assert self.seed.first_difference() is None

    def _pieces(self, spec: CopySpec) -> Iterator[CopySpec]:
        for start in range(0, spec.nbytes, self.piece):
            nbytes = min(self.piece, spec.nbytes - start)
            yield CopySpec(spec.source, spec.offset + start, spec.into, spec.at + start, nbytes)
