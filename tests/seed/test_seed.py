"""A seed: its leases, its generation and its digests; and that every fork has the weights of one moment."""

import gc
import logging
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import zmq
from processes import Child, serve

import tensorfork
from tensorfork.seed import digests as digests_module
from tensorfork.seed import service as seed_module
from tensorfork.seed.service import MAX_LEASES
from tensorfork.testing import Fault, FaultyTransport
from tensorfork.testing.faults import Job
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation

SECONDS = 20.0


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((5000,), value) for i in range(8)}


def soon() -> float:
    return time.monotonic() + SECONDS


@contextmanager
def connected(address: str) -> Iterator[Conversation]:
    conversation = Conversation(address, soon())
    try:
        yield conversation
    finally:
        conversation.close()


def take(conversation: Conversation, seconds: float = SECONDS, digests: bool = False) -> messages.Leased:
    request = messages.TakeLease("zeromq", {}, seconds, digests)
    return conversation.request(request, messages.Leased, soon(), "lease")[0]


def check(conversation: Conversation, lease: bytes, release: bool = False) -> int:
    return conversation.request(messages.CheckLease(lease, release), messages.Checked, soon(), "check")[0].generation


def until(true: Callable[[], bool], what: str) -> None:
    end = soon()
    while not true():
        assert time.monotonic() < end, f"{what}: not so after {SECONDS} s"
        time.sleep(0.005)


def under_way(then: Callable[[], None]) -> FaultyTransport:
    """A transport that calls `then` once its first copy has arrived, and then makes the others."""

    class Then(Fault):
        def pull(self, job: Job) -> None:
            job.run([0], job.done)
            then()
            job.run(range(1, len(job.copies)), job.done)

    return FaultyTransport(ZeroMQ(), Then())


# Leases.


def test_a_lease_ends_when_its_time_is_over() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        lease = take(conversation, seconds=0.1)
        until(lambda: seed.stats().running == 0, "the lease ends")
        assert seed.stats().expired == 1
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            check(conversation, lease.lease)


def test_a_lease_that_is_given_back_is_over_at_once() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        lease = take(conversation)
        assert check(conversation, lease.lease) == 0
        assert seed.stats().running == 1
        check(conversation, lease.lease, release=True)
        until(lambda: seed.stats().running == 0, "the lease ends")
        assert seed.stats().expired == 0
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            conversation.request(messages.GetDigests(lease.lease), messages.Digests, soon(), "digests")


def test_a_lease_whose_fork_is_gone_is_over_soon() -> None:
    with tensorfork.publish(model()) as seed:
        for _ in range(3):
            with connected(seed.address) as conversation:
                take(conversation, seconds=3600.0)
        until(lambda: seed.stats().running == 0, "the leases end")
        assert seed.stats().expired == 0
        tensorfork.fork(seed.address, timeout=SECONDS)


def test_a_lease_whose_fork_is_there_and_says_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_module, "LIVENESS_INTERVAL", 0.01)
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation, connected(seed.address) as other:
        lease = take(conversation, seconds=3600.0)
        for _ in range(100):  # about a hundred liveness checks
            other.request(messages.Hello("test"), messages.Welcome, soon(), "hello")
            time.sleep(0.01)
        assert check(conversation, lease.lease) == 0


def test_a_fork_beyond_the_number_of_leases_is_refused() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        leases = [take(conversation) for _ in range(MAX_LEASES)]
        with pytest.raises(tensorfork.PeerRefused, match=f"{MAX_LEASES} forks already"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        check(conversation, leases[0].lease, release=True)
        until(lambda: seed.stats().running < MAX_LEASES, "a lease ends")
        tensorfork.fork(seed.address, timeout=SECONDS)
        stats = seed.stats()
        assert (stats.granted, stats.refused) == (MAX_LEASES + 1, 1)


def test_a_transport_that_was_not_offered_is_refused_and_those_offered_are_named() -> None:
    with tensorfork.publish(model(), transports=["zeromq"]) as seed, connected(seed.address) as conversation:
        with pytest.raises(tensorfork.TransportUnavailable, match="does not offer 'pigeon'; it has: zeromq"):
            conversation.request(messages.TakeLease("pigeon", {}, 1.0, False), messages.Leased, soon(), "lease")
        assert seed.stats().refused == 1


def test_a_seed_without_transports_says_so() -> None:
    with (
        tensorfork.publish(model(), transports=[]) as seed,
        pytest.raises(tensorfork.TransportUnavailable, match="offers: nothing"),
    ):
        tensorfork.fork(seed.address, timeout=SECONDS)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), tensorfork.TransportUnavailable("no memory")])
def test_a_transport_that_cannot_export_refuses_the_lease_and_the_seed_goes_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ZeroMQ):
        broken = True

        def export(self, *args: Any) -> Any:
            if self.broken:
                raise error
            return super().export(*args)

    transport = Broken()
    with tensorfork.publish(model(), transports=[transport]) as seed:
        with pytest.raises(tensorfork.TransportUnavailable, match="cannot export over zeromq: no memory"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        stats = seed.stats()
        assert (stats.granted, stats.refused, stats.running) == (0, 1, 0)
        transport.broken = False
        tensorfork.fork(seed.address, timeout=SECONDS)
    # an error of ours is expected from a transport; any other is logged with its traceback
    assert [record.levelno for record in caplog.records] == ([logging.ERROR] if type(error) is RuntimeError else [])


def test_serving_that_fails_ends_its_lease_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Export:
        def __init__(self, inner: Any) -> None:
            self.offer, self._inner = inner.offer, inner

        def serve(self, channel: Any) -> None:
            raise RuntimeError("it broke")

        def close(self, deadline: float) -> bool:
            return bool(self._inner.close(deadline))

    class Broken(ZeroMQ):
        broken = True

        def export(self, *args: Any) -> Any:
            return Export(super().export(*args)) if self.broken else super().export(*args)

    transport = Broken()
    with tensorfork.publish(model(), transports=[transport]) as seed:
        with connected(seed.address) as conversation:
            take(conversation, seconds=3600.0)
            until(lambda: seed.stats().running == 0, "the lease ends")
        transport.broken = False
        tensorfork.fork(seed.address, timeout=SECONDS)
    assert "it broke" in caplog.text


def test_memory_that_a_reader_can_still_reach_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorfork")

    class Open(ZeroMQ):
        def export(self, *args: Any) -> Any:
            export = super().export(*args)
            close = export.close
            export.close = lambda deadline: close(deadline) and False  # type: ignore[method-assign]
            return export

    with tensorfork.publish(model(), transports=[Open()]) as seed:
        tensorfork.fork(seed.address, timeout=SECONDS)
        until(lambda: seed.stats().running == 0, "the lease ends")
    assert "can still reach the memory" in caplog.text


def test_statistics_count_what_was_done() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.stats() == tensorfork.SeedStats(granted=0, refused=0, running=0, expired=0, digested=0)
        for _ in range(3):
            tensorfork.fork(seed.address, timeout=SECONDS)
        until(lambda: seed.stats().running == 0, "the leases end")
        assert seed.stats() == tensorfork.SeedStats(granted=3, refused=0, running=0, expired=0, digested=1)


def test_forks_at_once_are_all_served() -> None:
    with tensorfork.publish(model(3.0)) as seed:
        found: list[dict[str, torch.Tensor]] = []
        threads = [
            threading.Thread(target=lambda: found.append(tensorfork.fork(seed.address, timeout=SECONDS)))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 12
        assert all(bool((tensor == 3.0).all()) for one in found for tensor in one.values())
        assert seed.stats().digested == 1


# The end of a seed.


def test_a_seed_closes_twice_and_says_that_it_is_closed() -> None:
    seed = tensorfork.publish(model())
    assert "generation 0" in repr(seed)
    seed.close()
    seed.close()
    assert "closed" in repr(seed)


def test_no_thread_of_a_seed_is_left_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        take(conversation, digests=True)
        assert {t.name for t in set(threading.enumerate()) - before} >= {"tensorfork-seed"}
    left = {t.name for t in set(threading.enumerate()) - before if t.name.startswith("tensorfork")}
    until(lambda: not {t for t in set(threading.enumerate()) - before if t.name == "tensorfork-digest"}, "digests end")
    assert left <= {"tensorfork-digest"}


def test_a_fork_under_way_fails_when_its_seed_closes() -> None:
    big = {"a": torch.zeros(48 << 18), "b": torch.zeros(48 << 18)}
    seed = tensorfork.publish(big)
    into = {name: torch.ones_like(tensor) for name, tensor in big.items()}
    started = time.monotonic()
    with pytest.raises((tensorfork.TransferFailed, tensorfork.PeerUnreachable)):
        tensorfork.fork_into(into, seed.address, transport=under_way(seed.close), timeout=SECONDS)
    assert time.monotonic() - started < SECONDS


def test_a_seed_that_nobody_holds_warns_and_is_closed() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seed = tensorfork.publish(model())
        address = seed.address
        del seed
        gc.collect()
    messages = [str(one.message) for one in caught if one.category is ResourceWarning]
    assert [message for message in messages if address in message and "never closed" in message]
    with pytest.raises(tensorfork.PeerUnreachable):
        tensorfork.fork(address, timeout=1.0)


def test_a_seed_that_nobody_holds_is_closed_while_it_is_in_use_too() -> None:
    """Its threads do not keep it from being garbage-collected."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        seed = tensorfork.publish(model())
        with connected(seed.address) as conversation:
            take(conversation)
            del seed
            gc.collect()
            with pytest.raises(tensorfork.PeerUnreachable):
                conversation.request(messages.Hello("test"), messages.Welcome, soon(), "hello")


def test_what_was_published_lives_as_long_as_its_seed() -> None:
    with tensorfork.publish(model(5.0)) as seed:  # nobody else holds the tensors
        gc.collect()
        assert all(bool((tensor == 5.0).all()) for tensor in tensorfork.fork(seed.address, timeout=SECONDS).values())


def test_a_seed_that_could_not_be_made_leaves_nothing_behind() -> None:
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in ({"bind": "tcp://0.0.0.0:*"}, {"bind": "nonsense"}, {"bind": "tcp://203.0.113.5:1"}):
            with pytest.raises((ValueError, OSError)):
                tensorfork.publish(model(), **bad)
        gc.collect()
    assert set(threading.enumerate()) == before


# The generation.


def test_the_generation_is_odd_while_the_weights_are_changed_and_another_one_afterwards() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.generation == 0
        with seed.updating():
            assert seed.generation == 1
        assert seed.generation == 2
        with seed.updating():
            assert seed.generation == 3
        assert seed.generation == 4


def test_a_change_that_fails_leaves_the_generation_odd_until_one_succeeds() -> None:
    with tensorfork.publish(model()) as seed:
        with pytest.raises(RuntimeError, match="broken"), seed.updating():
            raise RuntimeError("broken")
        assert seed.generation % 2 == 1
        with pytest.raises(tensorfork.SeedChanged, match="being changed"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        with pytest.raises(KeyboardInterrupt), seed.updating():
            raise KeyboardInterrupt
        assert seed.generation % 2 == 1
        with seed.updating():
            pass
        assert seed.generation % 2 == 0
        assert tensorfork.fork(seed.address, timeout=SECONDS).keys() == model().keys()


def test_changes_that_overlap_end_when_the_last_of_them_does() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as second:
            with seed.updating():
                second.enter_context(seed.updating())
                assert seed.generation == 1
            assert seed.generation == 1
        assert seed.generation == 2


def test_an_overlapping_change_that_fails_leaves_the_generation_odd() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as second:
            with pytest.raises(RuntimeError), seed.updating():  # noqa: PT012  # they overlap
                second.enter_context(seed.updating())
                raise RuntimeError("broken")
            assert seed.generation == 1
        assert seed.generation == 1
        with seed.updating():
            pass
        assert seed.generation == 2


def test_changes_from_many_threads_leave_an_even_generation() -> None:
    with tensorfork.publish(model()) as seed:
        odd: list[bool] = []

        def change() -> None:
            for _ in range(200):
                with seed.updating():
                    odd.append(seed.generation % 2 == 1)

        threads = [threading.Thread(target=change) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(odd)
        assert seed.generation % 2 == 0


def test_a_fork_during_a_change_is_refused() -> None:
    with tensorfork.publish(model()) as seed:
        into = model(7.0)
        with seed.updating(), pytest.raises(tensorfork.SeedChanged):
            tensorfork.fork_into(into, seed.address, timeout=SECONDS)
        assert all(bool((tensor == 7.0).all()) for tensor in into.values())


@pytest.mark.parametrize("verify", [True, False])
def test_a_change_under_the_fork_is_noticed(verify: bool) -> None:
    tensors = model(1.0)
    with tensorfork.publish(tensors) as seed:

        def change() -> None:
            with seed.updating():
                for tensor in tensors.values():
                    tensor.fill_(2.0)

        for into in (model(7.0), {name: tensor.to("meta") for name, tensor in tensors.items()}):
            with pytest.raises(tensorfork.SeedChanged, match="changed during the fork"):
                tensorfork.fork_into(into, seed.address, transport=under_way(change), verify=verify, timeout=SECONDS)
        assert all(tensor.is_meta for tensor in into.values())


@pytest.mark.parametrize("verify", [True, False])
def test_a_change_that_begins_under_the_fork_and_goes_on_is_noticed(verify: bool) -> None:
    with ExitStack() as change, tensorfork.publish(model()) as seed:
        transport = under_way(lambda: change.enter_context(seed.updating()))
        with pytest.raises(tensorfork.SeedChanged):
            tensorfork.fork(seed.address, transport=transport, verify=verify, timeout=SECONDS)


@pytest.mark.parametrize("verify", [True, False])
def test_a_fork_that_may_begin_again_does_so_and_says_how_often(verify: bool) -> None:
    tensors = model(1.0)
    with tensorfork.publish(tensors) as seed:
        left = [2.0, 3.0]

        def change() -> None:
            if left:
                with seed.updating():
                    for tensor in tensors.values():
                        tensor.fill_(left[0])
                left.pop(0)

        into = model(7.0)
        report = tensorfork.fork_into(
            into, seed.address, transport=under_way(change), verify=verify, restarts=5, timeout=SECONDS
        )
        assert (report.restarts, report.generation) == (2, 4)
        assert "2 restarts" in str(report)
        assert all(bool((tensor == 3.0).all()) for tensor in into.values())


def test_a_fork_waits_for_a_change_to_end_when_it_may_begin_again() -> None:
    with tensorfork.publish(model()) as seed:
        with ExitStack() as change:
            change.enter_context(seed.updating())
            timer = threading.Timer(0.3, change.pop_all().close)
            timer.start()
            found = tensorfork.fork(seed.address, restarts=10, timeout=SECONDS)
        timer.join()
        assert found.keys() == model().keys()


def test_a_fork_that_may_begin_again_still_ends_at_its_deadline() -> None:
    with tensorfork.publish(model()) as seed, seed.updating():
        started = time.monotonic()
        with pytest.raises(tensorfork.TensorForkError):
            tensorfork.fork(seed.address, restarts=1_000_000, timeout=0.5)
        assert time.monotonic() - started < 5


# Digests.


def test_digests_are_computed_once_for_each_generation() -> None:
    tensors = model()
    with tensorfork.publish(tensors) as seed:
        for generation in range(3):
            for _ in range(3):
                tensorfork.fork(seed.address, timeout=SECONDS)
            assert seed.stats().digested == generation + 1
            with seed.updating():
                for tensor in tensors.values():
                    tensor.add_(1.0)


def test_digests_are_not_computed_for_those_who_do_not_verify() -> None:
    with tensorfork.publish(model()) as seed:
        tensorfork.fork(seed.address, verify=False, timeout=SECONDS)
        assert seed.stats().digested == 0


class Gate:
    """Stops each computation of digests after it has read all bytes, until `open` is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Semaphore(0)
        compute = digests_module.DigestBatch.compute

        def stopping(checksums: Any, *args: Any, **options: Any) -> dict[str, int]:
            found = compute(checksums)
            self.reached.release()
            assert self.open.acquire(timeout=SECONDS)
            return found

        monkeypatch.setattr(digests_module.DigestBatch, "compute", stopping)


def digests(conversation: Conversation, lease: messages.Leased) -> messages.Digests:
    return conversation.request(messages.GetDigests(lease.lease), messages.Digests, soon(), "digests")[0]


def computing() -> bool:
    return any(thread.name == "tensorfork-digest" for thread in threading.enumerate())


def test_a_digest_computed_across_a_change_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        lease = take(conversation, digests=True)
        assert gate.reached.acquire(timeout=SECONDS)
        with seed.updating():
            pass
        gate.open.release()
        until(lambda: not computing(), "the computation ends")
        assert seed.stats().digested == 0
        with pytest.raises(tensorfork.SeedChanged):
            digests(conversation, lease)


def test_a_lease_of_the_new_generation_gets_its_digests_though_those_of_the_old_were_being_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)
    with (
        tensorfork.publish(model()) as seed,
        connected(seed.address) as old,
        connected(seed.address) as new,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as dealer,
    ):
        stale = take(old, digests=True)
        assert gate.reached.acquire(timeout=SECONDS)
        with seed.updating():
            pass
        lease = take(new, digests=True)
        assert lease.generation == 2
        dealer.connect(seed.address)
        dealer.send(messages.encode(messages.GetDigests(lease.lease), 7))
        dealer.send(messages.encode(messages.Hello("test"), 8))
        assert dealer.poll(SECONDS * 1000)
        assert (
            messages.decode(dealer.recv_multipart()[0], messages.REPLIES)[0] == 8
        )  # the first request has been read, and waits
        with pytest.raises(tensorfork.SeedChanged):  # answered while the computation still goes on
            digests(old, stale)
        gate.open.release()
        assert gate.reached.acquire(timeout=SECONDS)
        gate.open.release()
        assert dealer.poll(SECONDS * 1000)
        number, found = messages.decode(dealer.recv_multipart()[0], messages.REPLIES)
        assert (number, found.generation) == (7, 2)
        assert seed.stats().digested == 1


def test_digests_that_cannot_be_computed_are_refused_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = digests_module.DigestBatch.compute
    with tensorfork.publish(model()) as seed:
        with monkeypatch.context() as patch, connected(seed.address) as conversation:

            def fail(*args: Any, **options: Any) -> Any:
                raise RuntimeError("out of memory")

            patch.setattr(digests_module.DigestBatch, "compute", fail)
            with pytest.raises(tensorfork.PeerRefused, match="out of memory"):
                digests(conversation, take(conversation))
        assert digests_module.DigestBatch.compute is compute
        tensorfork.fork(seed.address, timeout=SECONDS)
    assert "out of memory" in caplog.text


def test_weights_changed_outside_of_updating_are_found_by_their_digests() -> None:
    tensors = model()
    with tensorfork.publish(tensors) as seed:
        tensorfork.fork(seed.address, timeout=SECONDS)
        tensors["layer.3"][17] = 5.0
        with pytest.raises(tensorfork.VerificationFailed) as caught:
            tensorfork.fork(seed.address, timeout=SECONDS)
        assert caught.value.tensors == ("layer.3",)


# Of one moment.


def mixed(found: dict[str, torch.Tensor]) -> bool:
    """Whether these hold more than one value."""
    first = next(iter(found.values())).flatten()[0]
    return not all(bool((tensor == first).all()) for tensor in found.values())


def many() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.zeros(30_000) for i in range(30)}  # few enough elements that torch uses one thread


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_while_a_thread_changes_the_weights(verify: bool) -> None:
    tensors, ended = many(), threading.Event()
    with tensorfork.publish(tensors) as seed:

        def change() -> None:
            value, draw = 0.0, random.Random(1)
            while not ended.is_set():
                value += 1.0
                with seed.updating():
                    for tensor in tensors.values():
                        tensor.fill_(value)
                ended.wait(draw.uniform(0.0, 0.3))  # sometimes long enough for a fork

        thread = threading.Thread(target=change)
        thread.start()
        try:
            forks, seen = 0, set()
            into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
            while forks < 15:
                tensorfork.fork_into(into, seed.address, verify=verify, restarts=10_000, timeout=SECONDS)
                assert not mixed(into)
                seen.add(float(into["layer.0"][0]))
                forks += 1
            assert len(seen) > 1, "nothing was changed meanwhile"
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_when_every_copy_meets_a_change(verify: bool) -> None:
    """The same, with a change between any two copies in turn."""
    tensors = model(0.0)
    with tensorfork.publish(tensors) as seed:
        value = iter(range(1, 1000))

        def change() -> None:
            with seed.updating():
                new = float(next(value))
                for tensor in tensors.values():
                    tensor.fill_(new)

        for at in range(9):

            class Between(Fault):
                met = False

                def pull(self, job: Job, at: int = at) -> None:
                    job.run(range(min(at, len(job.copies))), job.done)
                    if not self.met:
                        self.met = True
                        change()
                    job.run(range(at, len(job.copies)), job.done)

            transport = FaultyTransport(ZeroMQ(), Between(), piece=20_000)
            with pytest.raises(tensorfork.SeedChanged):
                tensorfork.fork(seed.address, transport=transport, verify=verify, timeout=SECONDS)
            transport = FaultyTransport(ZeroMQ(), Between(), piece=20_000)
            found = tensorfork.fork(seed.address, transport=transport, verify=verify, restarts=3, timeout=SECONDS)
            assert not mixed(found)


@pytest.mark.parametrize("verify", [True, False])
def test_no_model_is_ever_mixed_while_another_process_changes_the_weights(verify: bool) -> None:
    with Child(serve, many) as child:
        address = child.recv()
        for value in range(1, 21):
            child.send("update", float(value))  # goes on while we fork
            found = tensorfork.fork(address, verify=verify, restarts=10_000, timeout=SECONDS)
            assert not mixed(found)
            child.recv()
        found = tensorfork.fork(address, verify=verify, timeout=SECONDS)
        assert float(found["layer.0"][0]) == 20.0
