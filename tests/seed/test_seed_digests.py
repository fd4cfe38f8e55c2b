"""A seed's digests: computed once a generation, and thrown away when it changes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zmq
from seed_leases import SECONDS, connected, model, soon, take, until

import tensorfork
from tensorfork.seed import digests as digests_module
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation


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
        compute = digests_module.DigestBatch.pieces

        def stopping(checksums: Any, *args: Any, **options: Any) -> dict[str, Any]:
            found = compute(checksums)
            self.reached.release()
            assert self.open.acquire(timeout=SECONDS)
            return found

        monkeypatch.setattr(digests_module.DigestBatch, "pieces", stopping)


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


def test_who_waits_for_digests_of_a_seed_that_is_suspended_hears_that(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with (
        tensorfork.publish(model()) as seed,
        connected(seed.address) as conversation,
        ThreadPoolExecutor(2) as pool,
    ):
        waiting = pool.submit(digests, conversation, take(conversation, digests=True))
        assert gate.reached.acquire(timeout=SECONDS)
        until(lambda: bool(seed._service._digests._waiting), "the request waits")
        suspending = pool.submit(seed.suspend, SECONDS)
        until(lambda: bool(seed.generation % 2), "the seed is suspended")
        gate.open.release()
        suspending.result(SECONDS)
        with pytest.raises(tensorfork.SeedAsleep):
            waiting.result(SECONDS)


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
        number, _ = messages.decode(dealer.recv_multipart()[0], messages.REPLIES)
        assert number == 8  # the first request has been read, and waits
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
    compute = digests_module.DigestBatch.pieces
    with tensorfork.publish(model()) as seed:
        with monkeypatch.context() as patch, connected(seed.address) as conversation:

            def fail(*args: Any, **options: Any) -> Any:
                raise RuntimeError("out of memory")

            patch.setattr(digests_module.DigestBatch, "pieces", fail)
            with pytest.raises(tensorfork.PeerRefused, match="out of memory"):
                digests(conversation, take(conversation))
        assert digests_module.DigestBatch.pieces is compute
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
