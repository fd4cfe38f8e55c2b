"""Requests on the port of a ZeroMQ lease, from clients that are no forks, or send nonsense."""

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seed_leases import until
from zeromq_export import OFFER, SECONDS, ServedExport, dealer, recv_answer, request

from tensorfork import TransferFailed
from tensorfork.sockets import port
from tensorfork.sockets.port import NOBODY, TO_TOKEN
from tensorfork.testing.guarded_memory import contents
from tensorfork.transports.zeromq import FRAME, ZeroMQ


@pytest.fixture
def served() -> Iterator[ServedExport]:
    with ServedExport(ZeroMQ()) as served:
        yield served
        served.fork()  # still works, whatever the test did


def test_only_a_request_with_the_token_gets_bytes_and_another_is_told_once_that_this_is_not_its_seed(
    served: ServedExport,
) -> None:
    wrong = bytes([served.token[0] ^ 1]) + served.token[1:]
    with dealer(served) as client:
        for token in (wrong, bytes(16), served.token[::-1]):
            client.send(request(token, (served.region, 0, 10), number=1))
        assert client.poll(SECONDS * 1000)
        assert client.recv_multipart() == [NOBODY]
        client.send(request(served.token, (served.region, 3, 10), number=2))
        assert recv_answer(client) == (2, 0, [bytes(contents(3, [served.nbytes])[0][3:13].tolist())])
        assert not client.poll(0)


def test_strangers_are_told_so_in_a_bounded_number_of_answers(
    served: ServedExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "MAX_STRANGERS", 2)
    with ExitStack() as strangers:
        for told in (True, True, False):
            client = strangers.enter_context(dealer(served))
            client.send(request(bytes(16)))
            client.send(request(served.token, (served.region, 0, 0), number=2))
            answers = []
            for _ in range(2 + told):  # an answer has another message behind it
                assert client.poll(SECONDS * 1000)
                answers += client.recv_multipart()
            assert (NOBODY in answers) == told
    until(lambda: told_that_nobody_has_its_token(served), "those are forgotten")


def told_that_nobody_has_its_token(served: ServedExport) -> bool:
    with dealer(served) as client:
        client.send(request(bytes(16)))
        return bool(client.poll(200))


def test_a_greeting_is_answered(served: ServedExport) -> None:
    with dealer(served) as client:
        client.send(request(served.token, number=0))
        assert recv_answer(client) == (0, 0, [])


def test_a_fork_with_another_token_is_told_that_this_is_not_its_seed(served: ServedExport) -> None:
    with pytest.raises(TransferFailed, match="not the seed that granted the lease"):
        served.fork(OFFER.pack(bytes(16), FRAME, 0))


@pytest.mark.parametrize(
    "bad_range",
    [
        (0, 100_000, 1),
        (0, 99_999, 2),
        (0, 0, 100_001),
        (0, 1 << 63, 1),
        (0, (1 << 64) - 1, 1),
        (0, (1 << 64) - 1, 2),
        (0, 0, (1 << 64) - 1),
        (0, 1, (1 << 64) - 1),
        (1, 0, 1),
        (1 << 63, 0, 1),
    ],
    ids=str,
)
def test_a_range_outside_the_regions_is_refused_without_bytes(
    served: ServedExport, bad_range: tuple[int, int, int]
) -> None:
    region, offset, nbytes = bad_range
    with dealer(served) as client:
        client.send(request(served.token, (served.region, 0, 10), (served.region + region, offset, nbytes)))
        assert recv_answer(client) == (1, 1, [])


def test_a_request_without_ranges_is_refused_and_the_next_answer_is_whole(served: ServedExport) -> None:
    with dealer(served) as client:
        client.send(request(served.token, number=1))
        client.send(request(served.token, (served.region, 3, 10), (served.region, 0, 0), number=2))
        assert recv_answer(client) == (1, 1, [])
        assert recv_answer(client) == (2, 0, [bytes(contents(3, [served.nbytes])[0][3:13].tolist())])


def test_a_request_for_more_than_a_frame_is_refused() -> None:
    with ServedExport(ZeroMQ(), 4 << 20) as served, dealer(served) as client:
        client.send(request(served.token, (served.region, 0, FRAME + 1)))
        client.send(request(served.token, *[(served.region, i << 10, 1 << 16) for i in range(64)]))
        assert recv_answer(client) == recv_answer(client) == (1, 1, [])


@settings(max_examples=100)
@given(
    messages=st.lists(
        st.lists(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"TOKEN" + tail), max_size=4),
        min_size=1,
        max_size=6,
    )
)
def test_random_messages_on_the_port_do_no_harm(messages: list[list[bytes]]) -> None:
    served = _shared()
    with dealer(served) as client:
        for frames in messages:
            if frames:
                client.send_multipart([frame.replace(b"TOKEN", TO_TOKEN + served.token) for frame in frames])
        client.send(request(served.token, (served.region, 0, 10), number=77))
        while True:
            assert client.poll(SECONDS * 1000)
            header, *_ = client.recv_multipart()
            if len(header) == 9 and struct.unpack("<QB", header)[0] == 77:
                break
        assert client.poll(SECONDS * 1000)
        assert client.recv_multipart() == [b""]  # else the export gives up the buffer of this answer


@settings(max_examples=100)
@given(data=st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_on_the_port_do_no_harm(data: Sequence[bytes]) -> None:
    served = _shared()
    with socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) as connection:
        for some in data:
            try:
                connection.sendall(some)
            except ConnectionError:
                break  # the seed has closed the connection


_shared: Callable[[], ServedExport]


@pytest.fixture(autouse=True, scope="module")
def _shared_export() -> Iterator[None]:
    """One export for all examples of hypothesis."""
    global _shared
    with ServedExport(ZeroMQ()) as served:
        _shared = lambda: served  # noqa: E731
        yield
        served.fork()


def test_idle_connections_do_not_delay_forks(served: ServedExport) -> None:
    idle = [socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS) for _ in range(100)]
    served.fork()
    for connection in idle:
        connection.close()


def test_a_connection_of_a_lease_is_not_ended_to_make_room(served: ServedExport) -> None:
    at = served.export._port
    with dealer(served) as client, dealer(served) as stranger:
        for one, token in ((client, served.token), (stranger, bytes(16))):
            one.send(request(token, number=0))
            assert one.poll(SECONDS * 1000)
        assert [at._is_kept(peer) for peer in at._token_of] == [True]
        at.detach(served.token)
        assert [at._is_kept(peer) for peer in at._token_of] == [False]
        at.attach(served.token, served.export._receive)


def test_an_error_that_nobody_expected_does_not_end_the_port(
    served: ServedExport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look, failures = served.export._port._guard.look, [OSError(9, "Bad file descriptor")]

    def failing(now: float) -> bool:
        if failures:
            raise failures.pop()
        return look(now)

    monkeypatch.setattr(served.export._port._guard, "look", failing)
    served.fork()
    assert not failures
    assert "it goes on" in caplog.text
