"""A served export of the ZeroMQ transport, forks of it, and a client that speaks its protocol."""

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import zmq
from attrs import evolve

from tensorfork import Copy, RemoteRegion, Site
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.transports.zeromq import ZeroMQ

SECONDS = 20.0
"""A deadline that is met with ease."""
SITE = Site("127.0.0.1", "127.0.0.1")
OFFER = struct.Struct("<16sIII")


def soon() -> float:
    return time.monotonic() + SECONDS


def unused_channel() -> QueueChannel:
    """The transport sends nothing on its channel."""
    return QueueChannel(lambda _: None)


class ServedExport:
    """An export of one region that is served on a thread. `fields` are those of the region that differ."""

    def __init__(self, transport: ZeroMQ, nbytes: int = 100_000, **fields: Any) -> None:
        self.transport, self.nbytes = transport, nbytes
        self.memory = GuardedMemory("cpu", [nbytes], 3)
        regions = [evolve(region, **fields) for region in self.memory.regions]
        self.export = transport.export(regions, SITE, {}, soon())
        self.token, self.port, self.frame, _ = OFFER.unpack(self.export.offer)
        self.region = self.memory.regions[0].id
        self._error: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.export.serve(unused_channel())
        except BaseException as error:
            self._error.append(error)

    def fork(self, offer: bytes | None = None, seconds: float = SECONDS, sizes: Sequence[int] | None = None) -> None:
        """Open a session, pull the region, in copies of these sizes or in one, and check that it arrived."""
        sizes = [self.nbytes] if sizes is None else sizes
        mine = GuardedMemory("cpu", [self.nbytes], 4)
        remote = [RemoteRegion(self.region, self.nbytes, "cpu")]
        session = self.transport.open(
            offer or self.export.offer, SITE.host, remote, mine.regions, unused_channel(), soon()
        )
        done: list[int] = []
        try:
            into, starts = mine.regions[0].id, accumulate(sizes, initial=0)
            copies = [Copy(0, self.region, at, into, at, size) for at, size in zip(starts, sizes, strict=False)]
            session.pull(copies, time.monotonic() + seconds, done.append, threading.Event())
        finally:
            session.close(soon())
        mine.expect(0, 0, contents(3, [self.nbytes])[0][: sum(sizes)])
        assert mine.first_difference() is None
        assert sorted(done) == list(range(len(sizes)))

    def __enter__(self) -> "ServedExport":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.export.close(soon())
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert self._error == []


@contextmanager
def free_ports(count: int) -> Iterator[range]:
    """A range of ports on which nobody listens."""
    draw = random.Random(0)
    while True:
        first = draw.randrange(20_000, 30_000)
        taken = []
        try:
            for port in range(first, first + count):
                taken.append(socket.create_server(("127.0.0.1", port)))  # noqa: PERF401  # those before the one that fails
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
        yield range(first, first + count)
        return


@contextmanager
def dealer(served: ServedExport) -> Iterator[Any]:
    """A DEALER socket that is connected to the port of an export."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 2000
        client.connect(f"tcp://127.0.0.1:{served.port}")
        yield client


def recv_answer(client: Any) -> tuple[int, int, list[bytes]]:
    """The number, the status and the other frames of the next answer. Receives the empty message behind it, too."""
    assert client.poll(SECONDS * 1000)
    header, *frames = client.recv_multipart()
    assert client.poll(SECONDS * 1000)
    assert client.recv_multipart() == [b""]
    return (*struct.unpack("<QB", header), frames)


def request(token: bytes, *ranges: tuple[int, int, int], number: int = 1) -> bytes:
    """A request for ranges, each (region, offset, nbytes)."""
    return struct.pack("<16sQ", token, number) + b"".join(struct.pack("<QQQ", *one) for one in ranges)
