"""The port that a lease is served on, beside the one of the seed's address: it is mapped, or leads to another seed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import torch
from engine_seeds import needs_mooncake
from networks import Forwarder, closed_port, port_of, silent
from seed_leases import SECONDS, connected, soon

import tensorfork
from tensorfork.transports.base import Transport
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.transfer_engine import TransferEngine
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages

pytestmark = pytest.mark.slow

LONG = 300.0
"""Timeout of a fork that must end long before it."""
BOUND = 20.0
"""Seconds that stand for a bound of 1 or 4 s."""


def model(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((10_000,), value)}


def cannot_fork(address: str, transport: Transport | str, *words: str) -> None:
    """A fork is told so soon and in these words, and leaves the model as it was."""
    into, started = model(7.0), time.monotonic()
    with pytest.raises(tensorfork.TransportUnavailable) as caught:
        tensorfork.fork_into(into, address, transport=transport, timeout=LONG)
    assert time.monotonic() - started < BOUND
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(into["a"], model(7.0)["a"])


def elsewhere(port: int, kind: type[Any], **options: Any) -> Transport:
    """A transport whose seed offers this port."""

    class Elsewhere(kind):  # type: ignore[misc]
        def open(self, offer: bytes, *rest: Any) -> Any:
            token, _, *others = msgpack.unpackb(offer)
            offer = msgpack.packb([token, port, *others])
            return super().open(offer, *rest)

    return Elsewhere(**options)  # type: ignore[no-any-return]


def test_over_zeromq_the_seed_s_own_port_is_enough() -> None:
    with (
        tensorfork.publish(model(), transports=["zeromq"]) as seed,
        Forwarder(("127.0.0.1", port_of(seed.address)), host="127.0.0.2") as mapped,
    ):
        for _ in range(2):
            into = model(7.0)
            assert tensorfork.fork_into(into, mapped.address, timeout=SECONDS).transport == "zeromq"
            assert torch.equal(into["a"], model()["a"])


def test_where_only_the_seed_s_own_port_is_mapped_the_error_says_so_at_once() -> None:
    transport = "gloo"
    with (
        tensorfork.publish(model()) as seed,
        Forwarder(("127.0.0.1", port_of(seed.address)), host="127.0.0.2") as mapped,
    ):
        cannot_fork(
            mapped.address,
            transport,
            f"{transport}: port ",
            "at 127.0.0.2",
            "the connection is refused",
            "beside the one of the seed's address",
            "ports=",
            "another transport",
        )
        assert torch.equal(tensorfork.fork(seed.address, timeout=SECONDS)["a"], model()["a"])


def test_a_port_that_is_silent_is_an_error_soon() -> None:
    with tensorfork.publish(model()) as seed, silent() as (_, port):
        cannot_fork(seed.address, elsewhere(port, Gloo), f"port {port} at 127.0.0.1", "nobody answers there")


def test_auto_goes_on_with_the_next_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorfork.publish(model(), transports=["gloo", "zeromq"]) as seed:
        monkeypatch.setattr("tensorfork.transports.registry.AUTO", ("gloo", "zeromq"))
        with Forwarder(("127.0.0.1", port_of(seed.address)), host="127.0.0.2") as mapped:
            into = model(0.0)
            report = tensorfork.fork_into(into, mapped.address, timeout=SECONDS)
    assert report.transport == "zeromq"
    assert "cannot be reached" in report.passed_over["gloo"]
    assert torch.equal(into["a"], model()["a"])


def test_a_port_that_is_closed_because_the_seed_was_suspended_is_reported_as_that() -> None:
    class Late(ZeroMQ):
        def open(self, *arguments: Any) -> Any:
            seed.suspend()
            return super().open(*arguments)

    with tensorfork.publish(model()) as seed, pytest.raises(tensorfork.SeedAsleep):
        tensorfork.fork_into(model(), seed.address, transport=Late(), timeout=SECONDS)


# Connections that reach several seeds.

SPREAD = "is the address of several seeds"


@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
def test_a_virtual_ip_that_spreads_connections_is_named(transport: str) -> None:
    with (
        tensorfork.publish(model(1.0)) as one,
        tensorfork.publish(model(2.0)) as other,
        Forwarder(*(("127.0.0.1", port_of(seed.address)) for seed in (one, other)), host="127.0.0.2") as virtual,
    ):
        why = "not the seed that granted the lease" if transport == "zeromq" else "the connection is refused"
        cannot_fork(virtual.address, transport, virtual.address, SPREAD, "headless", why)


@contextmanager
def another_s_lease(transport: Callable[[], Transport], name: str) -> Iterator[int]:
    """The port of a lease that another seed has granted."""
    with tensorfork.publish(model(2.0), transports=[transport()]) as other, connected(other.address) as conversation:
        facts = dict(transport().facts([]))
        request = messages.TakeLease(name, facts, SECONDS, False)
        _, (offer, *_) = conversation.request(request, messages.Leased, soon(), "lease")
        yield int(msgpack.unpackb(offer)[1])


def test_who_reaches_another_seed_s_lease_hears_that_and_waits_for_nothing() -> None:
    with tensorfork.publish(model(1.0)) as seed, another_s_lease(Gloo, "gloo") as port:
        cannot_fork(seed.address, elsewhere(port, Gloo), f"port {port}", "not the seed that granted the lease")


@needs_mooncake
def test_an_engine_s_port_that_is_silent_or_closed_is_an_error_soon() -> None:
    class Elsewhere(TransferEngine):
        def open(self, offer: bytes, host: str, remote: Any, *rest: Any) -> Any:
            regions = {region.id: OfferedRegion(1 << 20, ()) for region in remote}
            return super().open(Offer("tcp", b"another.", bytes(8), port, regions).pack(), host, remote, *rest)

    with tensorfork.publish(model(), transports=["transfer_engine:tcp"]) as seed:
        port = closed_port()
        cannot_fork(seed.address, Elsewhere(fabric="tcp"), f"port {port}", "refused", "MC_MIN_RPC_PORT")
        with silent() as (_, port):
            cannot_fork(seed.address, Elsewhere(fabric="tcp"), f"port {port}", "nobody answers there")
