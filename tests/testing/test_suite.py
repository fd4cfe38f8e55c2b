"""The transport suite finds faults: a transport that breaks its contract in one way fails a test of the suite."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import pytest
import torch
from broken_transports import Broken, custom, finds, harness_for, with_fault

import tensorfork
from tensorfork import Copy, Export, Region, Session, TransferFailed
from tensorfork.testing import Fault, FaultyTransport, TransportSuite, faults
from tensorfork.testing.faults import Job
from tensorfork.testing.harness import SAME_PROCESS, Harness
from tensorfork.testing.lease_under_test import TIME_TOLERANCE
from tensorfork.transports.zeromq import ZeroMQ


class TestWithoutAnyFault(TransportSuite):
    """A wrapper without a fault keeps the contract."""

    ways = (SAME_PROCESS,)
    big = 24 << 20

    def make(self) -> tensorfork.Transport:
        return FaultyTransport(ZeroMQ(), Fault())


# Bytes.


@pytest.mark.parametrize(
    "fault",
    [
        faults.Flip(byte=99_999, bit=7),
        faults.SwapWords(),
        faults.ZeroPage(page=3),
        faults.StalePage(page=3),
        faults.Shift(),
        faults.Drop(),
        faults.LateFlip(),
    ],
    ids=str,
)
def test_every_corruption_fails_the_suite(fault: Fault) -> None:
    finds(with_fault(lambda: fault), Broken.test_a_region_arrives, "is there|bytes differ")


def test_swapped_copies_fail_the_suite() -> None:
    finds(with_fault(faults.SwapCopies), Broken.test_many_regions_in_random_order_arrive, "before it is there")


def test_a_byte_written_before_a_destination_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        job.run(range(len(job.copies)), job.done)
        copy = job.copies[0]
        job.memory[copy.into][copy.at - 1] ^= 1

    finds(
        custom(pull),
        Broken.test_odd_sizes_at_odd_offsets_arrive_and_their_neighbours_stay,
        "1 bytes differ",
        64,
    )


def test_a_byte_written_beyond_a_region_fails_the_suite() -> None:
    class Beyond(ZeroMQ):
        def open(self, offer: bytes, host: str, remote: Any, regions: Sequence[Region], *rest: Any) -> Any:
            for region in regions:
                ctypes.memset(region.address + region.nbytes, 0, 1)
            return super().open(offer, host, remote, regions, *rest)

    finds(Beyond, Broken.test_many_regions_in_random_order_arrive, "byte .* of region .* differ")


def test_a_write_into_the_seed_fails_the_suite() -> None:
    class WritesToSeed(ZeroMQ):
        def export(self, regions: Sequence[Region], *rest: Any) -> Any:
            ctypes.memset(regions[0].address, 0, regions[0].nbytes)
            return super().export(regions, *rest)

    with pytest.raises(AssertionError), harness_for(WritesToSeed) as (suite, harness):
        suite.test_a_region_arrives(harness)


# Calls of done.


def test_done_called_twice_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        job.run(range(len(job.copies)), job.done)
        job.done(0)

    finds(custom(pull), Broken.test_a_region_arrives, "called twice")


def test_done_never_called_fails_the_suite() -> None:
    finds(
        custom(lambda job: job.run(range(len(job.copies)), lambda i: None)),
        Broken.test_a_region_arrives,
        "exactly once",
    )


def test_done_called_too_early_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        for i in range(len(job.copies)):
            job.done(i)
        job.run(range(len(job.copies)), lambda i: None)

    finds(custom(pull), Broken.test_a_region_arrives, "before it is there")


def test_done_called_on_another_thread_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        errors: list[BaseException] = []

        def done(i: int) -> None:
            try:
                job.done(i)
            except BaseException as error:
                errors.append(error)

        def report(i: int) -> None:
            thread = threading.Thread(target=done, args=(i,))
            thread.start()
            thread.join()

        job.run(range(len(job.copies)), report)
        for error in errors:
            raise error

    finds(custom(pull), Broken.test_a_region_arrives, "another thread")


def test_an_error_of_done_that_is_swallowed_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        def done(i: int) -> None:
            try:
                job.done(i)
            except KeyboardInterrupt:
                pass

        job.run(range(len(job.copies)), done)

    finds(
        custom(pull),
        Broken.test_what_done_raises_ends_the_pull_and_reaches_the_caller,
        "DID NOT RAISE",
        KeyboardInterrupt,
    )


# Cancellation, deadlines, errors and the end of a lease.


def without_cancel(job: Job) -> None:
    job.inner.pull(job.copies, job.deadline, job.done, threading.Event())


def without_deadline(job: Job) -> None:
    job.inner.pull(job.copies, time.monotonic() + 10, job.done, job.cancel)


def test_a_transport_that_ignores_cancellation_fails_the_suite() -> None:
    finds(custom(without_cancel), Broken.test_nothing_is_pulled_once_cancelled, "DID NOT RAISE")
    finds(custom(without_cancel), Broken.test_a_pull_ends_soon_when_it_is_cancelled_from_done, "DID NOT RAISE")


class WaitsTooLong(ZeroMQ):
    """Opens a session with a seed that does not serve, and waits there for bytes beyond any deadline."""

    def open(self, *args: Any) -> Session:
        return _NeverServed()


class _NeverServed(Session):
    fabric = "none"

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        cancel.wait(max(0.0, deadline - time.monotonic()) + 2 * TIME_TOLERANCE)
        raise TransferFailed("nothing came")

    def close(self, deadline: float) -> None:
        pass


def test_a_transport_without_deadlines_fails_the_suite() -> None:
    finds(custom(without_deadline), Broken.test_nothing_is_pulled_past_the_deadline, "DID NOT RAISE")
    finds(
        WaitsTooLong,
        Broken.test_a_seed_that_does_not_serve_costs_no_more_than_the_deadline,
        "long after its deadline",
    )


def test_bytes_written_after_a_failure_fail_the_suite() -> None:
    """A thread goes on writing after pull has raised, as in a library that cannot cancel."""
    late: list[threading.Thread] = []

    def pull(job: Job) -> None:
        try:
            job.run(range(len(job.copies)), job.done)
        except TransferFailed:
            go_on = threading.Event()
            view = job.bytes_of(len(job.copies) - 1)

            def write() -> None:
                go_on.wait(0.3)
                view.bitwise_not_()

            late.append(threading.Thread(target=write))
            late[-1].start()
            raise

    def wait_and_end(suite: Broken, harness: Harness) -> None:
        with harness.lease([1000], [1000]) as lease:
            lease.fail([lease.stripes(1)[0]], seconds=-1.0)
            late[-1].join()

    finds(custom(pull), wait_and_end, "bytes differ")


class _Export(Export):
    """Wraps an export; subclasses change one thing about it."""

    def __init__(self, inner: Export) -> None:
        self.inner, self.offer = inner, inner.offer

    def serve(self, channel: Any) -> None:
        self.inner.serve(channel)

    def close(self, deadline: float) -> bool:
        return self.inner.close(deadline)


def exporting(change: type[_Export]) -> Callable[[], tensorfork.Transport]:
    class Changed(ZeroMQ):
        def export(self, *args: Any) -> Any:
            return change(super().export(*args))

    return Changed


def test_a_serve_that_raises_fails_the_suite() -> None:
    class Raises(_Export):
        def serve(self, channel: Any) -> None:
            super().serve(channel)
            raise RuntimeError("something broke")

    finds(exporting(Raises), Broken.test_a_region_arrives, "something broke")


def test_a_serve_that_does_not_end_fails_the_suite() -> None:
    over = threading.Event()

    class Lasts(_Export):
        def serve(self, channel: Any) -> None:
            super().serve(channel)
            over.wait()

    with harness_for(exporting(Lasts), seconds=0.5) as (suite, harness):
        try:
            with pytest.raises(AssertionError, match="serve did not return"):
                suite.test_a_region_arrives(harness)
        finally:
            over.set()


def test_a_session_that_cannot_be_closed_twice_fails_the_suite() -> None:
    class Once(Session):
        fabric = "tcp"

        def __init__(self, inner: Session) -> None:
            self.pull = inner.pull  # type: ignore[method-assign]
            self._inner: Session | None = inner

        def pull(self, *args: Any) -> None: ...

        def close(self, deadline: float) -> None:
            assert self._inner is not None, "closed before"
            self._inner.close(deadline)
            self._inner = None

    class Changed(ZeroMQ):
        def open(self, *args: Any) -> Any:
            return Once(super().open(*args))

    finds(Changed, Broken.test_closing_twice_and_after_a_failure_is_harmless, "closed before")


# What must be refused, and facts.


def test_a_transport_that_reads_beyond_regions_fails_the_suite() -> None:
    """It reads only what is within the region, and reports the whole copy as done."""

    def pull(job: Job) -> None:
        for i, copy in enumerate(job.copies):
            offset = min(copy.offset, 1000)
            whole = Copy(0, copy.region, offset, copy.into, copy.at, min(copy.nbytes, 1000))
            job.inner.pull([whole], job.deadline, lambda _, i=i: job.done(i), job.cancel)  # type: ignore[misc]

    finds(custom(pull), Broken.test_a_copy_beyond_a_seeds_region_is_refused, "was reported as done", -1, 2)


def test_a_transport_that_accepts_unknown_regions_fails_the_suite() -> None:
    def pull(job: Job) -> None:
        known = 7 + 3  # the id of the only region there is
        copies = [Copy(0, known, c.offset, c.into, c.at, c.nbytes) for c in job.copies]
        job.inner.pull(copies, job.deadline, job.done, job.cancel)

    finds(custom(pull), Broken.test_a_region_the_seed_does_not_have_is_refused, "was reported as done")


def test_a_transport_that_caches_bytes_fails_the_suite() -> None:
    """It returns what it read first, whatever the seed holds by then."""
    cache: dict[Copy, torch.Tensor] = {}

    def pull(job: Job) -> None:
        job.run(range(len(job.copies)), lambda i: None)
        for i, copy in enumerate(job.copies):
            job.bytes_of(i).copy_(cache.setdefault(copy, job.bytes_of(i).clone()))
            job.done(i)

    test = Broken.test_a_session_pulls_again_and_brings_what_the_seed_holds_by_then
    finds(custom(pull), test, "before it is there")


def test_facts_that_do_not_travel_fail_the_suite() -> None:
    class SetAsFact(ZeroMQ):
        def facts(self, regions: Any) -> Any:
            return {"regions": {1, 2}}

    with harness_for(SetAsFact) as (suite, harness), pytest.raises(TypeError, match="serialize"):
        suite.test_facts_travel_and_say_that_the_two_sides_fit(harness)


def test_facts_that_change_fail_the_suite() -> None:
    class Changing(ZeroMQ):
        def facts(self, regions: Any) -> Any:
            return {"now": os.urandom(8)}

    finds(Changing, Broken.test_facts_travel_and_say_that_the_two_sides_fit, None)


def test_a_cover_that_does_not_hold_its_regions_fails_the_suite() -> None:
    class Shifted(ZeroMQ):
        def cover(self, regions: Sequence[Region]) -> Any:
            _, places = super().cover(regions)
            return [Region(r.id, r.address + 1, r.nbytes, r.device) for r in regions], places

    finds(Shifted, Broken.test_each_region_lies_within_the_one_that_covers_it, None)
