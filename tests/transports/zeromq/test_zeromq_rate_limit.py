"""A seed's rate limit over ZeroMQ: the answers of each lease are let through by the limiter of the site."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq
from seed_leases import until
from zeromq_export import SECONDS, ServedExport, dealer, recv_answer, request, soon, started_port

from tensorfork import RateLimiter, Site
from tensorfork.transports.rate_limit import LEAST_PIECE
from tensorfork.transports.zeromq import ZeroMQ


@contextmanager
def site(rate: float | None) -> Iterator[Site]:
    with started_port() as port:
        yield Site("127.0.0.1", "127.0.0.1", port=port, limiter=RateLimiter(rate))


@contextmanager
def asked_of(served: ServedExport, count: int) -> Iterator[Any]:
    """A client that has asked for so many answers as long as they can be, and reads none by itself."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.rcvhwm = client.sndhwm = 1
        client.rcvbuf = 64 << 10
        client.linger = 0
        client.connect(f"tcp://127.0.0.1:{served.port}")
        for number in range(1, count + 1):
            client.send(request(served.token, (served.region, 0, served.frame), number=number))
        yield client


def test_answers_are_as_short_as_the_limit_wants_them() -> None:
    with site(1e6) as slow, ServedExport(ZeroMQ(), site=slow) as served:
        assert served.frame == LEAST_PIECE
    with site(None) as free, ServedExport(ZeroMQ(), site=free) as served:
        assert served.frame > LEAST_PIECE


def test_only_bytes_that_are_sent_are_counted() -> None:
    with site(1e9) as limited, ServedExport(ZeroMQ(), 1000, limited) as served, dealer(served) as client:
        client.send(request(served.token, (served.region, 900, 200)))
        recv_answer(client)
        assert limited.limiter.spent == 0
        client.send(request(served.token, (served.region, 0, 100), (served.region, 500, 300)))
        recv_answer(client)
        assert limited.limiter.spent == 400


def test_a_fork_that_stops_reading_leaves_the_rate_to_the_others() -> None:
    nbytes = 8 << 20
    with (
        site(1e9) as limited,
        ServedExport(ZeroMQ(), nbytes, limited) as stopped,
        ServedExport(ZeroMQ(), nbytes, limited) as other,
        asked_of(stopped, 15),
    ):
        until(lambda: limited.limiter.spent > 0, "its first answer leaves")
        other.fork()
        assert limited.limiter.spent >= nbytes + stopped.frame


def test_a_lease_that_ends_while_it_waits_for_the_limit_frees_its_share() -> None:
    with site(1000.0) as limited:
        with ServedExport(ZeroMQ(), 1 << 20, limited) as waiting, asked_of(waiting, 2):
            until(lambda: bool(limited.limiter._waiting), "the second answer waits, for minutes")
            ended = threading.Thread(target=waiting.export.close, args=(soon(),))
            ended.start()
            ended.join(SECONDS / 2)
            assert not ended.is_alive()
        assert not limited.limiter._waiting
        assert limited.limiter.spent == LEAST_PIECE
