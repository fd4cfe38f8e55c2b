"""Answers of a seed that breaks the ZeroMQ transport's protocol, or hangs up."""

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import zmq
from zeromq_export import OFFER, SECONDS, soon, unused_channel

from tensorfork import Copy, RemoteRegion, Session, TransferFailed
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.zeromq import FRAME, ZeroMQ


@contextmanager
def bad_seed(answer: Callable[[int], list[bytes] | None]) -> Iterator[int]:
    """A port on which the request of each number gets the frames that `answer` returns."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            if router.poll(20):
                peer, request = router.recv_multipart()
                number = struct.unpack_from("<Q", request, 17)[0]
                frames = answer(number) if number else [header(0)]  # a greeting has number 0
                if frames is not None:
                    router.send_multipart([peer, *frames])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield port
    finally:
        ended.set()
        thread.join()
        context.destroy(linger=0)


def open_session(port: int, mine: GuardedMemory, remote: Sequence[RemoteRegion] = ()) -> Session:
    """A fork's session with a seed at this port."""
    offer, channel = OFFER.pack(bytes(16), FRAME, 0), unused_channel(port)
    return ZeroMQ(connections=1).open(offer, "127.0.0.1", remote, mine.regions, channel, soon())


def header(number: int, status: int = 0) -> bytes:
    return struct.pack("<QB", number, status)


BAD_ANSWERS: dict[str, Callable[[int], list[bytes] | None]] = {
    "no bytes": lambda number: [header(number)],
    "a byte too few": lambda number: [header(number), bytes(99)],
    "a byte too many": lambda number: [header(number), bytes(101)],
    "very many bytes": lambda number: [header(number), bytes(1 << 20)],
    "a frame too many": lambda number: [header(number), bytes(100), b""],
    "very many frames": lambda number: [header(number), *[bytes(100)] * 1000],
    "an answer to another request": lambda number: [header(number + 1), bytes(100)],
    "no header": lambda number: [bytes(100)],
    "an empty header": lambda number: [b"", bytes(100)],
    "a long header": lambda number: [header(number) + b"x", bytes(100)],
    "an unknown status": lambda number: [header(number, 7), bytes(100)],
    "memory that is gone": lambda number: [header(number, 2)],
    "a frame longer than any": lambda number: [header(number), bytes(FRAME + 1)],
    "nothing": lambda number: None,
    "an empty message": lambda number: [b""],
}


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_fails_the_pull_and_changes_nothing_outside_its_destination(kind: str, copies: int) -> None:
    mine = GuardedMemory("cpu", [1000], 4)
    with bad_seed(BAD_ANSWERS[kind]) as port:
        session = open_session(port, mine, [RemoteRegion(1, 1000, "cpu")])
        try:
            into, step = mine.regions[0].id, 100 // copies
            wanted = [Copy(0, 1, i * step, into, 200 + i * step, step) for i in range(copies)]
            done: list[int] = []
            with pytest.raises(TransferFailed):
                session.pull(wanted, time.monotonic() + 0.5, done.append, threading.Event())
            assert done == []
            mine.expect(0, 200, mine.view(0, 200, 100))  # the destination itself may hold anything
            assert mine.first_difference() is None
            with pytest.raises(TransferFailed, match="failed before"):
                session.pull(wanted, soon(), done.append, threading.Event())
        finally:
            session.close(soon())


def test_a_connection_that_ends_while_an_answer_is_awaited_fails_the_pull_at_once() -> None:
    mine = GuardedMemory("cpu", [1000], 4)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def close() -> None:
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, header(0)])
            router.recv_multipart()
            router.close(linger=0)

        thread = threading.Thread(target=close)
        thread.start()
        session = open_session(port, mine)
        started = time.monotonic()
        try:
            with pytest.raises(TransferFailed, match="closed the connection, or died"):
                session.pull([Copy(0, 1, 0, mine.regions[0].id, 0, 9)], soon(), lambda _: None, threading.Event())
        finally:
            session.close(soon())
            thread.join()
        assert time.monotonic() - started < SECONDS / 2


def test_an_answer_that_nobody_requested_fails_this_pull_or_the_next() -> None:
    mine = GuardedMemory("cpu", [1000], 4)

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, header(0)])
            peer, request = router.recv_multipart()
            number = struct.unpack_from("<Q", request, 17)[0]
            for _ in range(2):
                router.send_multipart([peer, header(number), bytes(100)])
            router.send_multipart([peer, b""])

        thread = threading.Thread(target=answer)
        thread.start()
        session = open_session(port, mine)
        copy = Copy(0, 1, 0, mine.regions[0].id, 200, 100)

        def pull_twice() -> None:
            for _ in range(2):
                session.pull([copy], soon(), lambda _: None, threading.Event())

        try:
            with pytest.raises(TransferFailed, match="not the answer"):
                pull_twice()
        finally:
            session.close(soon())
            thread.join()
