"""What forks say on channels that nobody reads is bounded, for each lease and for all together."""

import time
from typing import Any

import pytest
from seed_leases import SECONDS, connected, model, soon, take, until

import tensorfork
from tensorfork.wire import messages
from tensorfork.wire.listener import SeedChannel

LIMIT, SHARE, IN_ALL = SeedChannel.MAX_UNREAD_BYTES, SeedChannel.SHARE, SeedChannel.MAX_UNREAD_IN_ALL


def channel() -> SeedChannel:
    listener: Any = None
    return SeedChannel(listener, b"peer", b"lease")


def test_a_channel_takes_so_many_messages_and_so_many_bytes_and_more_once_they_are_read() -> None:
    few, long = channel(), channel()
    for _ in range(SeedChannel.MAX_UNREAD):
        assert few.deliver(b"x", lambda: 0)
    assert not few.deliver(b"x", lambda: 0)
    assert long.deliver(bytes(LIMIT // 2), lambda: 0)
    assert long.deliver(bytes(LIMIT // 2), lambda: 0)
    assert not long.deliver(b"x", lambda: 0)
    assert long.unread == LIMIT
    long.recv(time.monotonic() + SECONDS)
    assert long.unread == LIMIT // 2
    assert long.deliver(b"x", lambda: 0)


def test_where_too_much_waits_in_all_a_channel_has_its_share_and_no_more() -> None:
    one = channel()
    assert one.deliver(bytes(SHARE), lambda: 2 * IN_ALL)
    assert not one.deliver(b"x", lambda: IN_ALL)
    assert one.deliver(b"x", lambda: IN_ALL - 1)


def test_leases_whose_channels_nobody_reads_cost_the_seed_no_more_than_their_shares(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is read of what forks say over ZeroMQ but that it has come."""
    with (
        tensorfork.publish(model(), leases_per_connection=64) as seed,
        connected(seed.address) as conversation,
    ):
        leases = [take(conversation).lease for _ in range(40)]
        for _ in range(3):
            for lease in leases:
                conversation.send(lease, bytes(400 << 10), soon())
                conversation.request(messages.Hello("0"), messages.Welcome, soon(), "hello")  # it was received
        tensorfork.fork(seed.address, timeout=SECONDS)  # an honest fork is served
        until(lambda: seed.stats().running < len(leases), "leases are ended")
        assert seed._service._leases.unread() <= max(IN_ALL, len(leases) * SHARE)
    assert "sends more messages than its transport reads" in caplog.text
