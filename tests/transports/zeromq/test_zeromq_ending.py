"""Forks that hang up at the moment when their lease ends, in the middle of answers: the seed's process lives."""

import random
import threading
import time
from typing import Any

import pytest
import zmq
from processes import Child
from zeromq_export import ServedExport, request

from tensorfork.transports.zeromq import ZeroMQ

pytestmark = pytest.mark.slow


def end_leases_as_forks_hang_up(pipe: Any, stable: bool, ranges: int) -> None:
    """libzmq ends the process if a peer goes at the moment when the socket is closed, and a message is half sent."""
    draw = random.Random(1)
    for _ in range(60):
        with ServedExport(ZeroMQ(), 8 << 20, stable=stable) as served:
            clients = [zmq.Context() for _ in range(4)]
            step = served.frame // ranges
            for context in clients:
                client = context.socket(zmq.DEALER)
                client.linger, client.rcvhwm = 0, 1
                client.connect(f"tcp://127.0.0.1:{served.port}")
                for number in range(12):
                    wanted = [(served.region, i * step, step) for i in range(ranges)]
                    client.send(request(served.token, *wanted, number=number))
            time.sleep(draw.random() * 0.02)
            hang_up = [threading.Thread(target=context.destroy, kwargs={"linger": 0}) for context in clients]
            for thread in hang_up:
                thread.start()
        for thread in hang_up:
            thread.join()
    pipe.send("alive")


@pytest.mark.parametrize("ranges", [1, 32])
@pytest.mark.parametrize("stable", [False, True], ids=["copied", "lent"])
def test_forks_that_hang_up_as_their_lease_ends_do_not_end_the_seed(stable: bool, ranges: int) -> None:
    with Child(end_leases_as_forks_hang_up, stable, ranges) as seed:
        assert seed.recv() == "alive"
