"""Leases over gloo with both ends in this process, for tests that send and receive the messages themselves."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack

import tensorfork
from tensorfork import Copy, Site
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.process_group import Gloo

BATCH = 4096
DIRECT = {"parcel": BATCH, "small": 1}
"""Options with which each copy of `BATCH` bytes is a batch of its own, and nothing is packed."""
LOOPBACK = Site("127.0.0.1", "127.0.0.1")
SECONDS = 60.0
"""A deadline that is easily met."""


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def served(
    export: tensorfork.Export, change: Callable[[list[Any]], list[Any] | None] = lambda message: message
) -> Iterator[tuple[QueueChannel, list[BaseException]]]:
    """Serve an export on a thread, and close it at the end.

    Yields the fork's end of its channel, and a list to which an exception that `serve` raises is added. `change` gets
    each message of the seed's, and returns what the fork receives instead; None for nothing.
    """

    def pass_on(packed: bytes) -> None:
        if (message := change(msgpack.unpackb(packed))) is not None:
            fork_end.deliver(msgpack.packb(message))

    fork_end = QueueChannel(lambda _: None)
    seed_end = QueueChannel(pass_on)
    fork_end.connect(seed_end.deliver)
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            export.serve(seed_end)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield fork_end, raised
    finally:
        assert export.close(time.monotonic() + SECONDS)
        thread.join(SECONDS)
        assert not thread.is_alive()


def export(memory: GuardedMemory, seconds: float = SECONDS, **options: Any) -> tensorfork.Export:
    return Gloo(**options).export(memory.regions, LOOPBACK, {}, time.monotonic() + seconds)


def recv(channel: QueueChannel) -> list[Any]:
    message: list[Any] = msgpack.unpackb(channel.recv(time.monotonic() + SECONDS))
    return message


def send(channel: QueueChannel, *message: Any) -> None:
    channel.send(msgpack.packb(message), time.monotonic() + SECONDS)


@contextmanager
def opened(
    memory: GuardedMemory, into: GuardedMemory, channel: QueueChannel, offer: bytes, **options: Any
) -> Iterator[tensorfork.Session]:
    remote = [tensorfork.RemoteRegion(region.id, region.nbytes, region.device) for region in memory.regions]
    session = Gloo(**options).open(offer, "127.0.0.1", remote, into.regions, channel, time.monotonic() + SECONDS)
    try:
        session.ready(time.monotonic() + SECONDS)
        yield session
    finally:
        session.close(time.monotonic() + SECONDS)


def batch_copies(memory: GuardedMemory, into: GuardedMemory, count: int) -> list[Copy]:
    """So many copies, of one batch each."""
    source, destination = memory.regions[0].id, into.regions[0].id
    return [Copy(0, source, i * BATCH, destination, i * BATCH, BATCH) for i in range(count)]
