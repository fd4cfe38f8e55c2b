"""Leases: granted, given back, expired, refused."""

import logging
import threading
import time
from collections import deque
from typing import Any

import pytest
import torch
import zmq
from seed_leases import SECONDS, check, connected, model, soon, take, until

import tensorfork
from tensorfork.sockets.connection_guard import ConnectionGuard
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages

pytestmark = pytest.mark.slow


def test_a_lease_ends_when_its_time_is_over() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        lease = take(conversation, seconds=0.1)
        until(lambda: seed.stats().running == 0, "the lease ends")
        assert seed.stats().expired == 1
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            check(conversation, lease.lease)


def test_a_lease_that_is_given_back_is_over_at_once() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation:
        lease = take(conversation)
        assert check(conversation, lease.lease) == 0
        assert seed.stats().running == 1
        check(conversation, lease.lease, release=True)
        until(lambda: seed.stats().running == 0, "the lease ends")
        assert seed.stats().expired == 0
        with pytest.raises(tensorfork.PeerRefused, match="the lease has ended"):
            conversation.request(messages.GetDigests(lease.lease), messages.Digests, soon(), "digests")


def test_a_lease_whose_fork_is_gone_is_over_at_once() -> None:
    """The end of the connection says so: the seed sends nothing to find it out."""
    with tensorfork.publish(model()) as seed:
        sent: list[object] = []
        for _ in range(3):
            with connected(seed.address) as conversation:
                take(conversation, seconds=3600.0)
                sent.clear()
                seed._service._listener.send = lambda peer, message, *rest, **more: sent.append(message)  # type: ignore[method-assign]
            until(lambda: seed.stats().running == 0, "the lease ends")
            del seed._service._listener.send
            assert {type(one) for one in sent} <= {messages.Ended}
        assert seed.stats().expired == 0
        tensorfork.fork(seed.address, timeout=SECONDS)


def test_a_request_of_a_connection_that_has_ended_gets_no_lasting_lease() -> None:
    """The connection's end may be known before its last message is received."""
    with tensorfork.publish(model()) as seed:
        guard, received = seed._service._listener.port._guard, threading.Event()

        def late(frames: list[zmq.Frame], **options: bool) -> None:
            if b"TakeLease" in frames[1].bytes:
                until(conversation_closed.is_set, "the connection ends")
                while guard._connections:
                    guard._handle_events(time.monotonic())
                received.set()
            ConnectionGuard.received(guard, frames, **options)

        conversation_closed = threading.Event()
        guard.received = late  # type: ignore[method-assign]
        seed._service._listener.port._gone = deque(maxlen=0)  # what cannot be sent does not tell
        with connected(seed.address) as conversation:
            request = messages.TakeLease("zeromq", {}, 3600.0, False)
            conversation._send_frames([messages.encode(request, 1)], soon(), "lease")
        conversation_closed.set()
        until(received.is_set, "the request is received")
        until(lambda: seed.stats().running == 0, "the lease ends")


def test_a_connection_that_the_seed_ends_has_no_leases_any_more() -> None:
    with tensorfork.publish(model()) as seed, connected(seed.address) as conversation, connected(seed.address) as other:
        lease, kept = take(conversation, seconds=3600.0), take(other, seconds=3600.0)
        held = seed._service._leases.get(lease.lease)
        assert held is not None
        seed._service._listener.end(held.peer)
        until(lambda: seed.stats().running == 1, "its lease ends")
        with pytest.raises(tensorfork.PeerUnreachable):
            check(conversation, lease.lease)
        assert check(other, kept.lease) == 0


def test_a_lease_whose_fork_is_there_and_says_nothing_stays() -> None:
    """Its libzmq answers the seed's pings."""
    with (
        tensorfork.publish(model(), stall=0.2) as seed,
        connected(seed.address) as conversation,
        connected(seed.address) as other,
    ):
        lease = take(conversation, seconds=3600.0)
        for _ in range(100):  # five times as long as a stall
            other.request(messages.Hello("test"), messages.Welcome, soon(), "hello")
            time.sleep(0.01)
        assert check(conversation, lease.lease) == 0


def test_a_transport_that_was_not_offered_is_refused_and_those_offered_are_named() -> None:
    with tensorfork.publish(model(), transports=["zeromq"]) as seed, connected(seed.address) as conversation:
        with pytest.raises(tensorfork.TransportUnavailable, match="does not offer 'pigeon'; it has: zeromq"):
            conversation.request(messages.TakeLease("pigeon", {}, 1.0, False), messages.Leased, soon(), "lease")
        assert seed.stats().refused == 1


def test_a_seed_without_transports_says_so() -> None:
    with (
        tensorfork.publish(model(), transports=[]) as seed,
        pytest.raises(tensorfork.TransportUnavailable, match="offers: nothing"),
    ):
        tensorfork.fork(seed.address, timeout=SECONDS)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), tensorfork.TransportUnavailable("no memory")])
def test_a_transport_that_cannot_export_refuses_the_lease_and_the_seed_goes_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ZeroMQ):
        broken = True

        def export(self, *args: Any) -> Any:
            if self.broken:
                raise error
            return super().export(*args)

    transport = Broken()
    with tensorfork.publish(model(), transports=[transport]) as seed:
        with pytest.raises(tensorfork.TransportUnavailable, match="cannot export over zeromq: no memory"):
            tensorfork.fork(seed.address, timeout=SECONDS)
        stats = seed.stats()
        assert (stats.granted, stats.refused, stats.running) == (0, 1, 0)
        transport.broken = False
        tensorfork.fork(seed.address, timeout=SECONDS)
    # an error of ours is expected from a transport; any other is logged with its traceback
    assert [record.levelno for record in caplog.records] == ([logging.ERROR] if type(error) is RuntimeError else [])


def test_serving_that_fails_ends_its_lease_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Export:
        def __init__(self, inner: Any) -> None:
            self.offer, self._inner = inner.offer, inner

        def serve(self, channel: Any) -> None:
            raise RuntimeError("it broke")

        def close(self, deadline: float) -> bool:
            return bool(self._inner.close(deadline))

    class Broken(ZeroMQ):
        broken = True

        def export(self, *args: Any) -> Any:
            return Export(super().export(*args)) if self.broken else super().export(*args)

    transport = Broken()
    with tensorfork.publish(model(), transports=[transport]) as seed:
        with connected(seed.address) as conversation:
            take(conversation, seconds=3600.0)
            until(lambda: seed.stats().running == 0, "the lease ends")
        transport.broken = False
        tensorfork.fork(seed.address, timeout=SECONDS)
    assert "it broke" in caplog.text


def test_memory_that_a_reader_can_still_reach_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorfork")

    class Open(ZeroMQ):
        def export(self, *args: Any) -> Any:
            export = super().export(*args)
            close = export.close
            export.close = lambda deadline: close(deadline) and False  # type: ignore[method-assign]
            return export

    with tensorfork.publish(model(), transports=[Open()]) as seed:
        tensorfork.fork(seed.address, timeout=SECONDS)
        until(lambda: seed.stats().running == 0, "the lease ends")
    assert "can still reach the memory" in caplog.text


def test_statistics_count_what_was_done() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.stats() == tensorfork.SeedStats(granted=0, refused=0, running=0, expired=0, digested=0)
        for _ in range(3):
            tensorfork.fork(seed.address, timeout=SECONDS)
        until(lambda: seed.stats().running == 0, "the leases end")
        sent = 3 * sum(tensor.nbytes for tensor in model().values())
        assert seed.stats() == tensorfork.SeedStats(granted=3, refused=0, running=0, expired=0, digested=1, sent=sent)


def test_forks_at_once_are_all_served() -> None:
    with tensorfork.publish(model(3.0)) as seed:
        found: list[dict[str, torch.Tensor]] = []
        threads = [
            threading.Thread(target=lambda: found.append(tensorfork.fork(seed.address, timeout=SECONDS)))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 12
        assert all(bool((tensor == 3.0).all()) for one in found for tensor in one.values())
        assert seed.stats().digested == 1
