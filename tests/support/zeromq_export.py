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

from tensorfork import Copy, Facts, RemoteRegion, Site
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import TO_TOKEN, Port
from tensorfork.testing.channel import QueueChannel
from tensorfork.testing.guarded_memory import GuardedMemory, contents
from tensorfork.transports.zeromq import ZeroMQ

SECONDS = 20.0
"""A deadline that is met with ease."""
OFFER = struct.Struct("<16sII")
LOOPBACK = Address("127.0.0.1", None)


_NO_FACTS: Facts = {}


def soon() -> float:
    return time.monotonic() + SECONDS


def unused_channel(port: int | None = None) -> QueueChannel:
    """The transport sends nothing on its channel. The seed is at this port."""
    channel = QueueChannel(lambda _: None)
    channel.seed = Address("127.0.0.1", port)
    return channel


@contextmanager
def started_port() -> Iterator[Port]:
    """A port that serves."""
    port = Port(LOOPBACK)
    port.start()
    try:
        yield port
    finally:
        port.close(soon())


class ServedExport:
    """An export of one region that is served on a thread. `fields` are those of the region that differ.

    `site` is the seed's; by default one with a port of its own.
    """

    def __init__(
        self,
        transport: ZeroMQ,
        nbytes: int = 100_000,
        site: Site | None = None,
        facts: Facts = _NO_FACTS,
        **fields: Any,
    ) -> None:
        self.transport, self.nbytes, self._own_port = transport, nbytes, None
        if site is None:
            self._own_port = Port(LOOPBACK)
            self._own_port.start()
            site = Site("127.0.0.1", "127.0.0.1", port=self._own_port)
        try:
            self._begin(site, facts, fields)
        except BaseException:
            self._close_port()
            raise

    def _begin(self, site: Site, facts: Facts, fields: dict[str, Any]) -> None:
        transport, nbytes = self.transport, self.nbytes
        assert site.port is not None
        self.memory = GuardedMemory("cpu", [nbytes], 3)
        regions = [evolve(region, **fields) for region in self.memory.regions]
        self.export = transport.export(regions, site, facts, soon())
        self.token, self.frame, _ = OFFER.unpack(self.export.offer)
        self.port = site.port.address.port
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
            offer or self.export.offer, "127.0.0.1", remote, mine.regions, unused_channel(self.port), soon()
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

    def _close_port(self) -> None:
        if self._own_port is not None:
            self._own_port.close(soon())

    def __exit__(self, *error: object) -> None:
        assert self.export.close(soon())
        self._close_port()
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
    """The number, the status and the other frames of the next answer. Receives the empty message behind bytes, too."""
    assert client.poll(SECONDS * 1000)
    header, *frames = client.recv_multipart()
    if frames:
        assert client.poll(SECONDS * 1000)
        assert client.recv_multipart() == [b""]
    return (*struct.unpack("<QB", header), frames)


def request(token: bytes, *ranges: tuple[int, int, int], number: int = 1) -> bytes:
    """A request for ranges, each (region, offset, nbytes)."""
    return TO_TOKEN + token + struct.pack("<Q", number) + b"".join(struct.pack("<QQQ", *one) for one in ranges)
