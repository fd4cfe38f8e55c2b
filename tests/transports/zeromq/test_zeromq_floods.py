"""A lease's data port, to which anybody may connect: who sends without end is cut off, and the lease goes on."""

import struct
import threading

import psutil
import pytest
from flood import NOTHING, PART, all_ended, flooding_seed, floods
from hostile import MUCH, frame
from processes import Child
from zeromq_export import OFFER, SECONDS, ServedExport, soon, unused_channel

from tensorfork import Copy, TransferFailed
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import TO_TOKEN
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.zeromq import FRAME, ZeroMQ


def test_messages_of_endless_parts_end_their_connections_and_not_the_lease() -> None:
    with ServedExport(ZeroMQ()) as served:
        before = psutil.Process().memory_info().rss
        with floods(("127.0.0.1", served.port), 3) as peers:
            assert all_ended(peers, SECONDS)
            served.fork()
        assert psutil.Process().memory_info().rss - before < MUCH


GREETED = frame(struct.pack("<QB", 0, 0))
"""The answer to a greeting."""


@pytest.mark.parametrize("part", [PART, NOTHING], ids=["parts", "parts of nothing"])
def test_a_seed_that_answers_without_end_fails_the_pull_and_costs_the_fork_little(part: bytes) -> None:
    mine = GuardedMemory("cpu", [1 << 20], 4)
    copy = Copy(0, 1, 0, mine.regions[0].id, 0, 1 << 20)
    with Child(flooding_seed, part, TO_TOKEN, GREETED) as child:
        channel = unused_channel(Address.parse(child.recv()).port)
        offer = OFFER.pack(bytes(16), FRAME, 0)
        before = psutil.Process().memory_info().rss
        session = ZeroMQ(connections=1).open(offer, "127.0.0.1", [], mine.regions, channel, soon())
        try:
            with pytest.raises(TransferFailed, match="without end"):
                session.pull([copy], soon(), lambda _: None, threading.Event())
        finally:
            session.close(soon())
        assert psutil.Process().memory_info().rss - before < MUCH
        assert child.recv() < 64 << 20
