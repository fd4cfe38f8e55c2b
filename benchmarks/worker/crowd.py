"""Peers of a seed that mean no good, or nothing: idle, slow, or flooding it. Without keys anybody may be one."""

import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import zmq

from benchmarks.worker import zmtp
from benchmarks.worker.state import WorkerState
from tensorfork.sockets.port import TO_TOKEN
from tensorfork.transports.zeromq.export import MAX_WAITING
from tensorfork.transports.zeromq.protocol import OFFER, RANGE, REQUEST_HEADER
from tensorfork.wire import messages, tables
from tensorfork.wire.conversation import Conversation, peer_address

SECONDS = 60.0
LEASES_EACH = 4
"""Leases that a seed grants one connection."""
RECEIVE_BUFFER = 4096
"""Bytes that the kernel takes for a peer that does not read."""

PARTS = {
    "parts of 255 bytes": zmtp.frame(bytes(255), zmtp.MORE) * 256,
    "parts of no bytes": bytes([zmtp.MORE, 0]) * 30_000,
    "parts of 1 MiB": zmtp.frame(bytes(1 << 20), zmtp.MORE),
    "requests whose answers are not read": zmtp.frame(messages.encode(messages.GetLayout(), 1)) * 16,
    "frames of 2^40 bytes": zmtp.ANNOUNCED + bytes(1 << 20),
}


def connect_idle(state: WorkerState, *, address: str, count: int, shake_hands: bool) -> int:
    """Open connections and leave them idle. With `shake_hands`, each is a ZeroMQ socket that has had a welcome,
    and goes on answering pings; else a plain connection that says nothing. Returns how many there are.
    """
    if not shake_hands:
        state.resources["idle"] = [socket.create_connection(_at(address), SECONDS) for _ in range(count)]
        return count
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 10)
    made = state.resources["idle"] = [context.socket(zmq.DEALER) for _ in range(count)]
    for one in made:
        one.linger = 0
        one.connect(address)
        one.send(messages.encode(messages.Hello("idle"), 1))
    return sum(bool(one.poll(SECONDS * 1000) and one.recv_multipart()) for one in made)


def hold_leases(state: WorkerState, *, address: str, count: int, trickle: bool) -> None:
    """Take leases over ZeroMQ, ask for all that one may have in flight, and read nothing, or a byte a second."""
    at, made = _at(address), state.resources.setdefault("held", [])
    peer = peer_address(address)
    until = time.monotonic() + SECONDS
    for number in range(count):
        if number % LEASES_EACH == 0:
            conversation = Conversation(peer, peer)
            made.append(conversation)
        request = messages.TakeLease("zeromq", {}, SECONDS, False)
        leased, frames = conversation.request(request, messages.Leased, until, "lease")
        token, size, _ = OFFER.unpack(frames[0])
        region = tables.unpack_regions(frames[1 : 1 + leased.regions], 1 << 20)[0]
        wanted = RANGE.pack(region.id, 0, min(size, region.nbytes))
        connection = zmtp.connect(at, SECONDS, RECEIVE_BUFFER)
        for request_number in range(1, MAX_WAITING):
            connection.sendall(zmtp.frame(TO_TOKEN + token + REQUEST_HEADER.pack(request_number) + wanted))
        made.append(connection)
    if trickle:
        readers = [one for one in made if isinstance(one, socket.socket)]
        threading.Thread(target=_trickle, args=(readers,), daemon=True).start()


def _trickle(readers: list[socket.socket]) -> None:
    while True:
        time.sleep(1.0)
        for one in readers:
            with suppress(OSError):
                one.setblocking(False)
                one.recv(1)


def let_go(state: WorkerState) -> None:
    """Close what was opened."""
    for one in [*state.resources.pop("held", ()), *state.resources.pop("idle", ())]:
        one.close()


def flood(state: WorkerState, *, address: str, kind: str, peers: int) -> None:
    """Begin to flood the seed, with so many connections at a time; each that is cut off is followed by another."""
    state.resources["flood"] = _Flood(_at(address), PARTS[kind], peers)


def flood_end(state: WorkerState) -> dict[str, float]:
    """Stop; MiB that were sent, and connections that were cut off."""
    ended: dict[str, float] = state.resources.pop("flood").stop()
    return ended


class _Flood:
    """Its connections, on one thread."""

    def __init__(self, at: tuple[str, int], part: bytes, peers: int) -> None:
        self._at, self._part, self._peers = at, part, peers
        self._sent = self._ended = 0
        self._stopped = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        self._stopped.set()
        self._thread.join()
        return {"sent": self._sent / 2**20, "ended": self._ended}

    def _run(self) -> None:
        while not self._stopped.is_set():
            while len(self._selector.get_map()) < self._peers:
                self._begin()
            for key, _ in self._selector.select(0.1):
                self._send(key)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _begin(self) -> None:
        with suppress(OSError):  # cut off at once
            made = zmtp.connect(self._at, SECONDS, RECEIVE_BUFFER)
            made.setblocking(False)
            self._selector.register(made, selectors.EVENT_WRITE, [0])

    def _send(self, key: selectors.SelectorKey) -> None:
        connection, position = key.fileobj, key.data
        assert isinstance(connection, socket.socket)
        try:
            sent = connection.send(memoryview(self._part)[position[0] :])
        except BlockingIOError:
            return
        except OSError:
            self._ended += 1
            self._selector.unregister(connection)
            connection.close()
            return
        self._sent += sent
        position[0] = (position[0] + sent) % len(self._part)


def _at(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)
