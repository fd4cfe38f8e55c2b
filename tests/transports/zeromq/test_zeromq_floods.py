"""A lease's data port, to which anybody may connect: who sends without end is cut off, and the lease goes on."""

import psutil
from flood import all_ended, floods
from hostile import MUCH
from zeromq_export import SECONDS, ServedExport

from tensorfork.transports.zeromq import ZeroMQ


def test_messages_of_endless_parts_end_their_connections_and_not_the_lease() -> None:
    with ServedExport(ZeroMQ()) as served:
        before = psutil.Process().memory_info().rss
        with floods(("127.0.0.1", served.port), 3) as peers:
            assert all_ended(peers, SECONDS)
            served.fork()
        assert psutil.Process().memory_info().rss - before < MUCH
