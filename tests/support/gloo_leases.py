"""Leases over gloo with the seed's end and the fork's in this process, for tests to speak to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack

import tensorfork
from tensorfork import Copy, Site
from tensorfork.testing.ends import Speaker
from tensorfork.testing.memory import Memory
from tensorfork.transports.process_group import Gloo

PARCEL = 4096
DIRECT = {"parcel": PARCEL, "small": 1}
"""Options with which each copy of `PARCEL` bytes is a parcel of its own, and nothing is packed."""
LOOPBACK = Site("127.0.0.1", "127.0.0.1")
SECONDS = 60.0
"""A deadline that is kept with ease."""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def served(
    export: tensorfork.Export, change: Callable[[list[Any]], list[Any] | None] = lambda words: words
) -> Iterator[tuple[Speaker, list[BaseException]]]:
    """An export that is served; the fork's end of its channel, and how serving ended. Ends like a lease.

    What the seed says reaches the fork as `change` makes it; None does not.
    """

    def pass_on(message: bytes) -> None:
        if (words := change(msgpack.unpackb(message))) is not None:
            forks.hear(msgpack.packb(words))

    forks = Speaker(lambda _: None)
    mine = Speaker(pass_on)
    forks._say = mine.hear
    ended: list[BaseException] = []

    def serve() -> None:
        try:
            export.serve(mine)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield forks, ended
    finally:
        assert export.close(time.monotonic() + SECONDS)
        thread.join(SECONDS)
        assert not thread.is_alive()


def export(memory: Memory, seconds: float = SECONDS, **options: Any) -> tensorfork.Export:
    return Gloo(**options).export(memory.regions, LOOPBACK, {}, time.monotonic() + seconds)


def hear(speaker: Speaker) -> list[Any]:
    found: list[Any] = msgpack.unpackb(speaker.recv(time.monotonic() + SECONDS))
    return found


def say(speaker: Speaker, *words: Any) -> None:
    speaker.send(msgpack.packb(words), time.monotonic() + SECONDS)


@contextmanager
def opened(
    memory: Memory, into: Memory, speaker: Speaker, offer: bytes, **options: Any
) -> Iterator[tensorfork.Session]:
    remote = [tensorfork.RemoteRegion(region.id, region.nbytes, region.device) for region in memory.regions]
    session = Gloo(**options).open(offer, "127.0.0.1", remote, into.regions, speaker, time.monotonic() + SECONDS)
    try:
        session.ready(time.monotonic() + SECONDS)
        yield session
    finally:
        session.close(time.monotonic() + SECONDS)


def stripes(memory: Memory, into: Memory, count: int) -> list[Copy]:
    """So many copies, of a parcel each."""
    here, there = memory.regions[0].id, into.regions[0].id
    return [Copy(0, here, i * PARCEL, there, i * PARCEL, PARCEL) for i in range(count)]
