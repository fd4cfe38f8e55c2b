"""Digests that nobody waits for any more are given up by their seed."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from seed_leases import SECONDS, connected, model, soon, take

import tensorfork
from tensorfork.digest import torch_digests
from tensorfork.digest.arrivals import ArrivalDigests
from tensorfork.model.describe import describe
from tensorfork.wire import messages

pytestmark = pytest.mark.slow


class Endless:
    """In place of a computation: it goes on until it is cancelled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.given_up = threading.Event(), threading.Event()
        self.usual: Callable[..., dict[str, Any]] = torch_digests._compute
        monkeypatch.setattr(torch_digests, "_compute", self)

    def __call__(self, tensors: Any, check: Callable[[], None], *others: object) -> dict[str, Any]:
        self.begun.set()
        try:
            while True:
                check()
        finally:
            self.given_up.set()


def test_they_are_given_up_when_the_lease_that_wants_them_ends_and_computed_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tensorfork.publish(model()) as seed:
        endless = Endless(monkeypatch)
        with connected(seed.address) as conversation:
            lease = take(conversation, digests=True)
            assert endless.begun.wait(SECONDS)
            assert not endless.given_up.is_set()
            conversation.request(messages.CheckLease(lease.lease, True), messages.Checked, soon(), "release")
            assert endless.given_up.wait(SECONDS)
        monkeypatch.setattr(torch_digests, "_compute", endless.usual)
        assert seed.digests().content == tensorfork.digests(model()).content


def test_they_are_given_up_when_the_fork_that_waits_for_them_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorfork.publish(model()) as seed:
        endless = Endless(monkeypatch)
        with connected(seed.address) as conversation:
            take(conversation, digests=True)
            assert endless.begun.wait(SECONDS)
        assert endless.given_up.wait(SECONDS)


def test_a_caller_in_the_seeds_own_process_waits_without_a_lease() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.digests().content == tensorfork.digests(model()).content


def test_a_forks_own_digests_end_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    Endless(monkeypatch)
    tensors, layouts = model(), describe(model()).layout.tensors
    deadline = time.monotonic() + 0.2
    arrivals = ArrivalDigests(lambda: tensors, layouts, [torch.device("cpu")], {}, [], None, deadline)
    with pytest.raises(tensorfork.TransferFailed, match="not all digests were computed by the deadline") as caught:
        arrivals.pieces()
    assert set(caught.value.complete) == set(tensors)
