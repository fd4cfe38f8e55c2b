"""The garbage collector is paused for the first seconds of a fork, and on again whatever happens."""

import gc
import os
import threading
import time
from typing import Any

import pytest
import torch

import tensorfork
from tensorfork import api
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.wire.conversation import Conversation

SECONDS = 60.0


def test_garbage_waits_for_a_fork_and_not_for_a_seed_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collections are put off for the first seconds of a fork, however long it then waits."""
    off: list[bool] = []
    request = Conversation.request

    def slow(conversation: Conversation, *args: Any) -> Any:
        off.append(not gc.isenabled())
        end = time.monotonic() + SECONDS
        while not gc.isenabled():
            assert time.monotonic() < end
            time.sleep(0.001)
        return request(conversation, *args)

    monkeypatch.setattr(Conversation, "request", slow)
    monkeypatch.setattr(api, "GC_PAUSE", 0.5)
    with tensorfork.publish({"x": torch.arange(10)}) as seed:
        tensorfork.fork_into({"x": torch.zeros(10, dtype=torch.int64)}, seed.address)
    assert off[0]
    assert not any(off[1:])
    assert gc.isenabled()


def test_collections_come_on_again_whatever_happens_and_are_left_alone_after_that() -> None:
    with gc_paused(0.001):
        end = time.monotonic() + SECONDS
        while not gc.isenabled():
            assert time.monotonic() < end
            time.sleep(0.001)
        gc.disable()  # somebody else, after the time was over
    assert not gc.isenabled()
    gc.enable()
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()


def test_collections_come_on_again_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(RuntimeError), gc_paused(60):
        raise AssertionError
    assert gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests leave torch's threads
def test_a_process_that_is_forked_off_meanwhile_collects() -> None:
    with gc_paused(60):
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert not gc.isenabled()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nobody_who_switched_collections_off_finds_them_on_after_a_fork() -> None:
    gc.disable()
    try:
        with tensorfork.publish({"x": torch.arange(10)}) as seed:
            tensorfork.fork_into({"x": torch.zeros(10, dtype=torch.int64)}, seed.address)
        assert not gc.isenabled()
    finally:
        gc.enable()
