"""Suspending a seed: nobody touches its memory until it is resumed; and draining it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from seed_leases import SECONDS, check, connected, model, soon, take, under_way, until

import tensorfork
from tensorfork.digest.batch import DigestBatch
from tensorfork.seed.leases import Lease
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.transports.zeromq.export import ZeroMQExport
from tensorfork.wire import messages


@pytest.fixture
def seed() -> Iterator[tensorfork.Seed]:
    with tensorfork.publish(model()) as seed:
        yield seed


def test_a_suspended_seed_refuses_forks_and_a_resumed_one_serves_them(seed: tensorfork.Seed) -> None:
    seed.suspend()
    for _ in range(2):
        with pytest.raises(tensorfork.SeedAsleep, match="suspended"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        seed.suspend()
    seed.resume()
    assert tensorfork.fork(seed.address, timeout=SECONDS).keys() == model().keys()
    seed.resume()
    assert tensorfork.fork(seed.address, timeout=SECONDS).keys() == model().keys()


def test_suspending_ends_the_forks_under_way_which_hear_why(seed: tensorfork.Seed) -> None:
    with pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork(seed.address, transport=under_way(seed.suspend), timeout=SECONDS)
    assert seed.stats().running == 0


def test_a_lease_is_over_when_suspend_returns(seed: tensorfork.Seed) -> None:
    with connected(seed.address) as conversation:
        lease = take(conversation)
        seed.suspend()
        assert seed.stats().running == 0
        assert not [one for one in threading.enumerate() if one.name in ("tensorfork-lease", "tensorfork-serve")]
        with pytest.raises(tensorfork.SeedAsleep):
            check(conversation, lease.lease)
        seed.resume()
        with pytest.raises(tensorfork.SeedAsleep):  # that lease's end does not change
            check(conversation, lease.lease)


def test_a_fork_that_waits_on_its_channel_or_speaks_there_hears_at_once_that_the_lease_has_ended(
    seed: tensorfork.Seed,
) -> None:
    with connected(seed.address) as conversation:
        lease = take(conversation)
        seed.suspend()
        for _ in range(2):
            with pytest.raises(tensorfork.LeaseEnded, match="suspended"):
                conversation.recv(lease.lease, soon())
        conversation.send(b"unknown", b"message", soon())
        with pytest.raises(tensorfork.LeaseEnded):
            conversation.recv(b"unknown", soon())


@pytest.mark.parametrize("terms", [{"wait": SECONDS}, {"restarts": 1}], ids=["wait", "restarts"])
def test_a_fork_that_may_waits_for_a_sleeping_seed_without_counting(
    seed: tensorfork.Seed, terms: dict[str, float]
) -> None:
    seed.suspend()
    ours = {name: torch.zeros_like(tensor) for name, tensor in model().items()}
    refused = seed.stats().refused
    with ThreadPoolExecutor(1) as pool:
        forking = pool.submit(tensorfork.fork_into, ours, seed.address, timeout=SECONDS, **terms)
        until(lambda: seed.stats().refused > refused + 3, "it has asked several times")
        assert not forking.done()
        seed.resume()
        assert forking.result().restarts == 0
    assert all(torch.equal(ours[name], tensor) for name, tensor in model().items())


def test_waiting_ends_with_the_error_of_the_seed(seed: tensorfork.Seed) -> None:
    seed.suspend()
    with pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork(seed.address, wait=0.2, timeout=SECONDS)
    with pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork(seed.address, timeout=0.5, restarts=3)


def test_the_memory_may_go_and_come_back_elsewhere(seed: tensorfork.Seed) -> None:
    tensors = {name: torch.full((5,), 3.0) for name in model()}
    with tensorfork.publish(tensors) as other:
        other.suspend()
        for name in tensors:
            tensors[name].untyped_storage().resize_(0)
            tensors[name] = torch.full((7,), 4.0)
        other.resume()
        found = tensorfork.fork(other.address, timeout=SECONDS)
        assert {tuple(one.tolist()) for one in found.values()} == {(4.0,) * 7}


def test_a_model_that_is_not_back_is_not_served(seed: tensorfork.Seed) -> None:
    tensors = {"a": torch.ones(5)}
    with tensorfork.publish(tensors) as other:
        other.suspend()
        tensors["a"].untyped_storage().resize_(0)
        with pytest.raises(tensorfork.UnsupportedTensor, match="freed or shrunk"):
            other.resume()
        with pytest.raises(tensorfork.SeedChanged, match="failed"):
            tensorfork.fork(other.address, timeout=SECONDS)
        tensors["a"] = torch.ones(5)
        other.rescan()
        assert tensorfork.fork(other.address, timeout=SECONDS)["a"].tolist() == [1.0] * 5


def test_weights_may_be_loaded_under_updating_while_it_is_suspended(seed: tensorfork.Seed) -> None:
    tensors = {"a": torch.ones(5)}
    with tensorfork.publish(tensors) as other:
        other.suspend()
        with other.updating(version="second"):
            tensors["a"] = torch.full((5,), 2.0)
        with pytest.raises(tensorfork.SeedAsleep):
            tensorfork.fork(other.address, timeout=SECONDS)
        other.resume()
        assert other.version.label == "second"
        assert tensorfork.fork(other.address, timeout=SECONDS, version="second")["a"].tolist() == [2.0] * 5


def test_who_can_still_read_is_named_and_suspending_again_goes_on_waiting(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export whose reader cannot be stopped, as one over CUDA IPC that does not close its handles."""
    close = ZeroMQExport.close
    monkeypatch.setattr(ZeroMQExport, "close", lambda export, deadline: close(export, deadline) and False)
    with connected(seed.address) as conversation:
        take(conversation)
        with pytest.raises(tensorfork.MemoryInUse, match="a fork over zeromq") as raised:
            seed.suspend(timeout=0.3)
        assert len(raised.value.users) == 1
        with pytest.raises(tensorfork.SeedAsleep):
            tensorfork.fork(seed.address, timeout=SECONDS)
    seed.suspend(timeout=SECONDS)  # its connection is gone, and with it the reader


def test_suspending_stops_the_computation_of_digests(seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    computing, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def compute(batch: DigestBatch, cancelled: Callable[[], bool], **options: object) -> dict[str, int]:
        computing.set()
        assert go_on.wait(SECONDS)
        seen.append(cancelled())
        return {}

    monkeypatch.setattr(DigestBatch, "pieces", compute)
    with connected(seed.address) as conversation:
        take(conversation, digests=True)
        assert computing.wait(SECONDS)
        with pytest.raises(tensorfork.MemoryInUse, match="computes digests"):
            seed.suspend(timeout=0.3)
        go_on.set()
        seed.suspend()
        assert seen == [True]


def test_a_lease_that_is_granted_just_as_the_seed_is_suspended_never_begins(
    seed: tensorfork.Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`suspend` has returned between the listener's decision to grant it and its being recorded."""
    exported: list[bool] = []
    export, add = ZeroMQ.export, seed._service._leases.add

    def late(lease: Lease) -> None:
        seed.suspend()
        add(lease)

    def counted(self: ZeroMQ, *args: object) -> ZeroMQExport:
        exported.append(True)
        return export(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(seed._service._leases, "add", late)
    monkeypatch.setattr(ZeroMQ, "export", counted)
    with pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork(seed.address, timeout=SECONDS)
    assert not exported


def test_a_draining_seed_lets_leases_end_and_grants_no_more(seed: tensorfork.Seed) -> None:
    with connected(seed.address) as conversation:
        lease = take(conversation)
        assert not seed.drain(timeout=0.1)
        with pytest.raises(tensorfork.PeerRefused, match="draining"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        assert check(conversation, lease.lease) == 0
        check(conversation, lease.lease, release=True)
        assert seed.drain(timeout=SECONDS)
    seed.resume()
    assert tensorfork.fork(seed.address, timeout=SECONDS).keys() == model().keys()


def test_a_suspended_seed_can_be_closed() -> None:
    seed = tensorfork.publish(model())
    seed.suspend()
    seed.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("tensorfork-")]


def test_a_change_longer_than_the_fork_s_timeout_is_reported_as_what_it_is() -> None:
    with tensorfork.publish(model()) as seed, seed.updating():
        began = time.monotonic()
        for restarts in (0, 1000):
            with pytest.raises(tensorfork.SeedChanged, match="being changed"):
                tensorfork.fork(seed.address, timeout=1, restarts=restarts)
        assert time.monotonic() < began + SECONDS


def test_a_lease_that_names_another_publication_is_refused(seed: tensorfork.Seed) -> None:
    with connected(seed.address) as conversation:
        for request, expected in (
            (messages.TakeLease("zeromq", {}, 5.0, False, 7), messages.Leased),
            (messages.GetLayout(7), messages.Pages),
        ):
            with pytest.raises(tensorfork.SeedChanged, match="published other tensors"):
                conversation.request(request, expected, soon(), "test")


def test_a_lease_that_is_ending_still_hears_that_its_fork_has_stopped() -> None:
    closing, stopped = threading.Event(), threading.Event()

    class Reading(ZeroMQ):
        """Its forks read by themselves, and say when they have stopped."""

        def export(self, *args: Any) -> Any:
            export = super().export(*args)
            close = export.close

            def serve(channel: Any) -> None:
                assert channel.recv(soon()) == b"stopped"
                stopped.set()

            def close_after_the_fork(deadline: float) -> bool:
                closing.set()
                return stopped.wait(max(0.0, deadline - time.monotonic())) and close(deadline)

            export.serve, export.close = serve, close_after_the_fork  # type: ignore[assignment, method-assign]
            return export

    with (
        tensorfork.publish(model(), transports=[Reading()]) as seed,
        connected(seed.address) as conversation,
        ThreadPoolExecutor(1) as pool,
    ):
        lease = take(conversation)
        suspending = pool.submit(seed.suspend, SECONDS)
        assert closing.wait(SECONDS)
        conversation.send(lease.lease, b"stopped", soon())
        suspending.result(SECONDS)
        assert stopped.is_set()
