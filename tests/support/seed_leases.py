"""A small seed, connections to it, and leases taken by hand."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tensorfork.testing import Fault, FaultyTransport
from tensorfork.testing.faults import Job
from tensorfork.transports.base import Transport
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation, peer_address

SECONDS = 20.0


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.full((5000,), value) for i in range(8)}


def soon() -> float:
    return time.monotonic() + SECONDS


def connection_to(address: str) -> Conversation:
    """A conversation with the seed at this numeric address, that has not said anything yet."""
    return Conversation(peer_address(address), peer_address(address))


@contextmanager
def connected(address: str) -> Iterator[Conversation]:
    conversation = connection_to(address)
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


def under_way(then: Callable[[], object], transport: Transport | None = None) -> FaultyTransport:
    """A transport, ZeroMQ by default, that calls `then` once its first copy has arrived, and then makes the others."""

    class Then(Fault):
        def pull(self, job: Job) -> None:
            job.run([0], job.done)
            then()
            job.run(range(1, len(job.copies)), job.done)

    return FaultyTransport(transport or ZeroMQ(), Then())
