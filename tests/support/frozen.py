"""Conversations between a fork and a seed, kept as bytes: recorded, played again, and as they may look in the future.

``python tests/support/frozen.py`` records those of the version of the protocol that the code has now. What a released
version said must be understood for as long as that version is: then its files stay as they are.

A file has a line for each message, in order: who says it (``fork`` or ``seed``), its kind, and its frames in hex.
"""

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import msgpack
import torch
import zmq
from seed_leases import connected, soon

import tensorfork
from tensorfork import Channel, Copy, Export, Facts, Region, RemoteRegion, Session, Site, Transport
from tensorfork.wire import messages

FOLDER = Path(__file__).parent.parent / "wire" / "frozen"
SECONDS = 20.0
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
IDENTITY = tensorfork.Identity(model="frozen", tags={"a": "b"})
RANK = tensorfork.Rank(tp=(0, 2))
FUTURE = {"of the future": {"a": [1, None, "b"]}}


class Said(NamedTuple):
    """One message of a conversation."""

    by_fork: bool
    kind: str
    frames: list[bytes]


# The model, and a transport that needs nothing but the conversation.


class Model(torch.nn.Module):
    """Tied and strided tensors, some of other dtypes, one that is left out, and plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4).T, requires_grad=False)
        self.tied = self.weight
        self.register_buffer("scale", torch.full((5,), 0.5, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(2))
        self.eps = 1e-5


class InOffer(Transport):
    """The seed's bytes are in the offer."""

    name = "in_offer"

    def export(self, regions: Sequence[Region], site: Site, fork: Facts, deadline: float) -> Export:
        return _InOfferExport({region.id: ctypes.string_at(region.address, region.nbytes) for region in regions})

    def open(
        self,
        offer: bytes,
        host: str,
        remote: Sequence[RemoteRegion],
        regions: Sequence[Region],
        channel: Channel,
        deadline: float,
    ) -> Session:
        channel.send(b"hello", deadline)
        assert channel.recv(deadline) == b"hello"
        return _InOfferSession(msgpack.unpackb(offer, strict_map_key=False), regions)


class _InOfferExport(Export):
    def __init__(self, held: dict[int, bytes]) -> None:
        self.offer = msgpack.packb(held)

    def serve(self, channel: Channel) -> None:
        with contextlib.suppress(tensorfork.PeerUnreachable):
            channel.send(channel.recv(soon()), soon())

    def close(self, deadline: float) -> bool:
        return True


class _InOfferSession(Session):
    fabric = "offer"

    def __init__(self, held: dict[int, bytes], regions: Sequence[Region]) -> None:
        self._held, self._ours = held, {region.id: region.address for region in regions}

    def pull(self, copies: Sequence[Copy], deadline: float, done: Callable[[int], None], cancel: Event) -> None:
        for i, copy in enumerate(copies):
            there = self._held[copy.region][copy.offset : copy.offset + copy.nbytes]
            ctypes.memmove(self._ours[copy.into] + copy.at, there, copy.nbytes)
            done(i)

    def close(self, deadline: float) -> None:
        """Nothing to release."""


def publish() -> tensorfork.Seed:
    """The seed of all conversations."""
    return tensorfork.publish(
        Model(), transports=[InOffer()], identity=IDENTITY, rank=RANK, exclude="cache", version="step-1"
    )


def fork(address: str) -> tuple[Model, tensorfork.ForkReport]:
    """A fork that goes well."""
    with torch.device("meta"):
        model = Model()
    report = tensorfork.fork_into(
        model,
        address,
        transport=InOffer(),
        timeout=SECONDS,
        identity=IDENTITY,
        rank=RANK,
        exclude="cache",
        trace=TRACE,
    )
    return model, report


def ask(address: str) -> tuple[list[bytes], list[str]]:
    """The pieces of the first tensor, and what is said of a lease that is over, and of one that never was."""
    errors, unknown = [], bytes(16)
    with connected(address) as conversation:
        request = messages.TakeLease(messages.NO_TRANSPORT, {}, SECONDS, True)
        lease = conversation.request(request, messages.Leased, soon(), "lease")[0].lease
        _, pieces = conversation.request(messages.GetPieces(lease, [0]), messages.Pieces, soon(), "pieces")
        conversation.request(messages.CheckLease(lease, True), messages.Checked, soon(), "release")
        for late in (
            lambda: conversation.request(messages.GetDigests(lease), messages.Digests, soon(), "digests"),
            lambda: conversation.send(unknown, b"late", soon()) or conversation.recv(unknown, soon()),
        ):
            try:
                late()
            except tensorfork.TensorForkError as error:
                errors.append(str(error))
    return pieces, errors


CONVERSATIONS: dict[str, Callable[[str], object]] = {"fork": fork, "ask": ask}


# Files.


def path_of(name: str) -> Path:
    """Where a conversation is kept, of this version of the protocol."""
    return FOLDER / f"{messages.VERSION}-{name}.txt"


def read(name: str) -> list[Said]:
    """A conversation that was kept."""
    lines = [line.split(" ") for line in path_of(name).read_text().splitlines()]
    return [Said(who == "fork", kind, [bytes.fromhex(one) for one in frames]) for who, kind, *frames in lines]


def write(name: str, said: Sequence[Said]) -> None:
    """Keep a conversation."""
    lines = [" ".join(["fork" if one.by_fork else "seed", one.kind, *(f.hex() for f in one.frames)]) for one in said]
    path_of(name).write_text("\n".join(lines) + "\n")


# Recording.


def _said(frames: list[bytes], *, by_fork: bool) -> Said:
    return Said(by_fork, msgpack.unpackb(frames[0])[3], frames)


@contextlib.contextmanager
def _between(handle: Callable[[Any, bytes, list[bytes]], None]) -> Iterator[str]:
    """A ROUTER at an address, whose messages are handled on a thread: with the socket, the peer and the frames."""
    ended = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as front:
        front.linger = 0
        port = front.bind_to_random_port("tcp://127.0.0.1")

        def run() -> None:
            while not ended.is_set():
                if front.poll(20):
                    peer, *frames = front.recv_multipart()
                    handle(front, peer, frames)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{port}"
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def asking(address: str) -> Iterator[Callable[[list[bytes]], list[bytes]]]:
    """A function that sends frames to a seed and returns its next message."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)

        def ask(frames: list[bytes]) -> list[bytes]:
            socket.send_multipart(frames)
            assert socket.poll(SECONDS * 1000), "the seed does not answer"
            return socket.recv_multipart()

        yield ask


@contextlib.contextmanager
def recorded(address: str, said: list[Said]) -> Iterator[str]:
    """A proxy to a seed for one fork, which records both. Each request has one answer."""
    with asking(address) as ask:

        def handle(front: Any, peer: bytes, frames: list[bytes]) -> None:
            answer = ask(frames)
            said.extend((_said(frames, by_fork=True), _said(answer, by_fork=False)))
            front.send_multipart([peer, *answer])

        with _between(handle) as proxy:
            yield proxy


def record() -> None:
    """Record the conversations, and what they may look like in the future."""
    for name, run in CONVERSATIONS.items():
        said: list[Said] = []
        with publish() as seed, recorded(seed.address, said) as proxy:
            run(proxy)
        write(name, said)
        write(f"{name}-of-the-future", [of_the_future(one) for one in said])


# The future.


def of_the_future(said: Said) -> Said:
    """The message with fields that nobody knows, in records within it too, and its tables with a column."""
    head = msgpack.unpackb(said.frames[0])
    body = head[4]
    for record in (body, body.get("version"), body.get("why"), *body.get("transports", {}).values()):
        if record is not None:
            record |= FUTURE
    tables = tables_of(said)
    others = said.frames[1 : len(said.frames) - len(tables)]
    later = [msgpack.packb(msgpack.unpackb(page) | FUTURE) for page in tables]
    return said._replace(frames=[msgpack.packb(head), *others, *later])


def tables_of(said: Said) -> list[bytes]:
    """The frames of a message that are pages of tables."""
    return said.frames[{"Pages": 1, "Leased": 2}.get(said.kind, len(said.frames)) :]


# Playing.


@contextlib.contextmanager
def played_seed(said: Sequence[Said]) -> Iterator[str]:
    """The seed of a conversation that was kept: it answers each request as it did then, under the request's number."""
    at = 0

    def handle(front: Any, peer: bytes, frames: list[bytes]) -> None:
        nonlocal at
        number, kind = msgpack.unpackb(frames[0])[2:4]
        while not (said[at].by_fork and said[at].kind == kind):
            at += 1
        answer = said[at + 1]
        head = msgpack.unpackb(answer.frames[0])
        head[2] = number
        front.send_multipart([peer, msgpack.packb(head), *answer.frames[1:]])
        at += 2

    with _between(handle) as address:
        yield address


def play_fork(said: Sequence[Said], address: str) -> list[Said]:
    """The fork of a conversation that was kept, at a seed of now: what that answers. Only the lease's id is its own."""
    answers: list[Said] = []
    then = now = b""
    with asking(address) as ask:
        for request, answer in zip(said[::2], said[1::2], strict=True):
            answers.append(
                _said(ask([frame.replace(then, now) if then else frame for frame in request.frames]), by_fork=False)
            )
            if answer.kind == answers[-1].kind == "Leased":
                then, now = (msgpack.unpackb(one.frames[0])[4]["lease"] for one in (answer, answers[-1]))
    return answers


if __name__ == "__main__":
    record()
