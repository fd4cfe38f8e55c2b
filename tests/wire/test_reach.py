"""Reaching a seed: names with several addresses, hosts that refuse or are silent, and seeds that are starting."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from networks import (
    NAME,
    PATIENCE,
    Forwarder,
    Resolver,
    closed_port,
    needs_ipv6,
    port_of,
    silent,
    wait_for_lost_syn,
)
from seed_leases import until

import tensorfork
from tensorfork.sockets import race

pytestmark = pytest.mark.slow

LONG = 300.0
"""Timeout of a fork that must end long before it."""
SOON = 15.0
"""Seconds that stand for a bound of 1 or 4 s."""


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((10_000,), value)}


def forks(address: str, value: float = 1.0, **terms: Any) -> None:
    into = model(0.0)
    tensorfork.fork_into(into, address, timeout=PATIENCE, **terms)
    assert torch.equal(into["a"], model(value)["a"])


def unreachable(address: str, *words: str, **terms: Any) -> BaseException:
    """A fork is told soon that nobody is there, in these words, and leaves the model as it was."""
    into, started = model(7.0), time.monotonic()
    with pytest.raises(tensorfork.PeerUnreachable) as caught:
        tensorfork.fork_into(into, address, timeout=terms.pop("timeout", LONG), **terms)
    assert time.monotonic() - started < SOON
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(into["a"], model(7.0)["a"])
    return caught.value


@contextmanager
def accepting() -> Iterator[int]:
    """A port of 127.0.0.2 that takes connections and says nothing."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        yield listener.getsockname()[1]


# A name with several addresses.


def test_where_the_first_address_refuses_the_next_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_ipv6()
    with tensorfork.publish(model()) as seed:
        Resolver(monkeypatch, ["::1", "127.0.0.1"])
        forks(f"tcp://{NAME}:{port_of(seed.address)}")


def test_where_the_first_address_takes_no_connection_the_next_one_is_tried_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(race, "SILENCE", LONG)  # who tried one after the other would wait for this long
    with silent("127.0.0.2") as (_, port), tensorfork.publish(model(), bind=f"tcp://127.0.0.1:{port}"):
        Resolver(monkeypatch, ["127.0.0.2", "127.0.0.1"])
        forks(f"tcp://{NAME}:{port}")


def test_where_the_first_address_takes_the_connection_and_is_silent_the_next_one_is_tried_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tensorfork.wire.reach.SILENCE", LONG)
    with accepting() as port, tensorfork.publish(model(), bind=f"tcp://127.0.0.1:{port}"):
        Resolver(monkeypatch, ["127.0.0.2", "127.0.0.1"])
        forks(f"tcp://{NAME}:{port}")


def test_where_the_first_address_is_something_else_the_next_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def talk() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n" + bytes(64))
                try:
                    while connection.recv(4096):
                        pass
                except OSError:
                    pass  # the fork has hung up

    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            with tensorfork.publish(model(), bind=f"tcp://127.0.0.1:{port}"):
                Resolver(monkeypatch, ["127.0.0.2", "127.0.0.1"])
                forks(f"tcp://{NAME}:{port}")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_where_none_answers_the_error_says_what_each_did(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent("127.0.0.2") as (_, port):
        Resolver(monkeypatch, ["127.0.0.1", "127.0.0.2", "127.0.0.3"])
        unreachable(
            f"tcp://{NAME}:{port}",
            f"tcp://{NAME}:{port}: none of its 3 addresses answers (at step hello)",
            "127.0.0.1: the connection is refused",
            "127.0.0.2: nobody answers there",
            "127.0.0.3: the connection is refused",
        )


def test_many_addresses_of_which_the_last_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorfork.publish(model(), bind="tcp://127.0.0.60:*") as seed:
        Resolver(monkeypatch, [f"127.0.0.{number}" for number in range(1, 61)])
        forks(f"tcp://{NAME}:{port_of(seed.address)}")


# The address that answered is the one.


@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
def test_every_connection_of_a_fork_goes_to_the_address_that_answered(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """As behind a headless service: each time the name is looked up, it is another seed's address."""
    with tensorfork.publish(model(1.0)) as one:
        port = port_of(one.address)
        with tensorfork.publish(model(2.0), bind=f"tcp://127.0.0.2:{port}") as other:
            resolver = Resolver(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
            forks(f"tcp://{NAME}:{port}", 1.0, transport=transport)
            assert resolver.asked == 1
            assert (one.stats().granted, other.stats().granted) == (1, 0)
            forks(f"tcp://{NAME}:{port}", 2.0, transport=transport)
            assert (one.stats().granted, other.stats().granted) == (1, 1)


# Refused, silent, and lost packets.


def test_a_refused_connection_is_an_error_at_once() -> None:
    address = f"tcp://127.0.0.1:{closed_port()}"
    unreachable(address, address, "the connection is refused", "step hello", "wait=")


def test_a_host_that_answers_no_packet_is_an_error_soon() -> None:
    with silent() as (host, port):
        unreachable(f"tcp://{host}:{port}", f"tcp://{host}:{port}", "nobody answers there", "step hello")


def test_a_process_that_is_stopped_is_an_error_soon() -> None:
    with accepting() as port:
        unreachable(f"tcp://127.0.0.2:{port}", "nobody answers there", "step hello")


def test_a_lost_packet_is_sent_again_and_the_fork_succeeds() -> None:
    with (
        tensorfork.publish(model()) as seed,
        Forwarder(("127.0.0.1", port_of(seed.address)), deaf=True) as lossy,
        ThreadPoolExecutor(1) as pool,
    ):
        greeting = pool.submit(tensorfork.digests, lossy.address, timeout=PATIENCE)
        wait_for_lost_syn(lossy.port)
        lossy.listen()
        assert set(greeting.result()) == {"a"}


# A seed that is starting.


def test_with_wait_a_seed_may_start_later(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    resolver = Resolver(monkeypatch, ["127.0.0.1"])
    with ThreadPoolExecutor(1) as pool:
        forking = pool.submit(forks, f"tcp://{NAME}:{port}", wait=PATIENCE)
        until(lambda: resolver.asked > 2, "the fork tries again")
        with tensorfork.publish(model(), bind=f"tcp://127.0.0.1:{port}"):
            forking.result()


def test_with_wait_a_name_may_come_later_or_be_another_s_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorfork.publish(model()) as seed:
        resolver = Resolver(monkeypatch, [], ["127.0.0.2"], ["127.0.0.1"])
        forks(f"tcp://{NAME}:{port_of(seed.address)}", wait=PATIENCE)
        assert resolver.asked == 3


def test_without_it_nobody_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, ["127.0.0.1"])
    unreachable(f"tcp://{NAME}:{closed_port()}", restarts=3)
    assert resolver.asked == 1


def test_when_the_wait_is_over_the_error_says_what_was_seen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, ["127.0.0.1"])
    error = unreachable(f"tcp://{NAME}:{closed_port()}", "the connection is refused", wait=0.3)
    assert resolver.asked > 1
    assert any("wait=" in note for note in error.__notes__)


def test_the_timeout_ends_the_wait_too() -> None:
    unreachable(f"tcp://127.0.0.1:{closed_port()}", "refused", wait=float("inf"), timeout=0.3)


def test_a_fork_that_waits_for_a_seed_to_start_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver, cancel = Resolver(monkeypatch, ["127.0.0.1"]), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        terms: dict[str, Any] = {"wait": LONG, "timeout": LONG, "cancel": cancel}
        forking = pool.submit(tensorfork.fork, f"tcp://{NAME}:{closed_port()}", **terms)
        until(lambda: resolver.asked > 2, "the fork tries again")
        cancel.set()
        assert isinstance(forking.exception(), tensorfork.ForkCancelled)
