"""The end of a seed: closed, or dropped by its owner."""

import gc
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from seed_leases import SECONDS, connected, model, soon, take, under_way

import tensorfork
from tensorfork.digest import torch_digests
from tensorfork.wire import messages

pytestmark = pytest.mark.slow


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
    assert not {t.name for t in set(threading.enumerate()) - before if t.name.startswith("tensorfork")}


def test_closing_ends_the_digests_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = threading.Event()

    def endless(tensors: object, check: Callable[[], None], *others: object) -> dict[str, Any]:
        while True:
            under_way.set()
            check()

    monkeypatch.setattr(torch_digests, "_compute", endless)
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        take(conversation, digests=True)
        assert under_way.wait(SECONDS)
    assert "tensorfork-digest" not in {thread.name for thread in threading.enumerate()}


def test_a_seed_closes_while_the_thread_of_a_lease_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, about, closed = tensorfork.publish(model()), threading.Event(), threading.Event()
    failed: list[BaseException] = []
    start = threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if thread.name == "tensorfork-serve":
            about.set()
            closed.wait(0.3)  # it waits for this thread, unless it fails
        start(thread)

    def close() -> None:
        about.wait(SECONDS)
        try:
            seed.close()
        except BaseException as error:
            failed.append(error)
        closed.set()

    monkeypatch.setattr(threading.Thread, "start", start_late)
    closer = threading.Thread(target=close)
    closer.start()
    with suppress(tensorfork.TensorForkError):
        tensorfork.fork(seed.address, timeout=SECONDS)
    closer.join()
    assert failed == []


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
