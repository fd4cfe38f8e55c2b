"""What a lease over ZeroMQ costs its seed: threads, descriptors and memory, whatever its fork does."""

from contextlib import ExitStack

import psutil
import pytest
import torch
import zmq
from seed_leases import SECONDS, connected, soon, until
from zeromq_export import ServedExport, request

import tensorfork
from tensorfork import PeerUnreachable, Site
from tensorfork.memory import host_slots
from tensorfork.sockets.address import Address
from tensorfork.sockets.port import Port
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages

LEASES = 12


def test_a_lease_costs_two_threads_and_a_few_descriptors() -> None:
    process = psutil.Process()
    model = {"a": torch.ones(1000)}
    with tensorfork.publish(model, transports=["zeromq"]) as seed, ExitStack() as stack:
        conversations = [stack.enter_context(connected(seed.address)) for _ in range(LEASES)]
        for conversation in conversations:
            conversation.request(messages.Hello("test"), messages.Welcome, soon(), "hello")
        before = process.num_threads(), process.num_fds()
        for conversation in conversations:
            take = messages.TakeLease("zeromq", {}, SECONDS, False)
            conversation.request(take, messages.Leased, soon(), "lease")
        threads, descriptors = process.num_threads() - before[0], process.num_fds() - before[1]
        assert threads <= 2 * LEASES
        assert descriptors <= 4 * LEASES


def test_further_leases_and_seeds_bring_no_threads_of_libzmq() -> None:
    with ExitStack() as stack:
        seeds = [stack.enter_context(tensorfork.publish({"a": torch.ones(10)})) for _ in range(2)]
        count = psutil.Process().num_threads()
        for seed in seeds * 2:
            tensorfork.fork(seed.address, transport="zeromq", timeout=SECONDS)
        seeds.append(stack.enter_context(tensorfork.publish({"a": torch.ones(10)})))
        until(lambda: all(not seed.stats().running for seed in seeds), "the leases end")
        until(lambda: psutil.Process().num_threads() <= count + 1 + len(seeds), "only a port's thread is new")


def test_a_reader_that_takes_nothing_is_ended_after_a_stall_and_its_share_is_free() -> None:
    port = Port(Address("127.0.0.1", None))
    port.start()
    pool = host_slots.pool()
    free = [len(kind) for kind in pool._free]
    served = ServedExport(ZeroMQ(), 16 << 20, Site("127.0.0.1", "127.0.0.1", port=port, stall=0.2))
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger, client.rcvhwm, client.rcvbuf = 0, 1, 1 << 16
        client.connect(str(port.address))
        for number in range(1, 9):
            client.send(request(served.token, (served.region, 0, served.frame), number=number))
        served._thread.join(SECONDS)
        assert not served._thread.is_alive()
        (error,) = served._error
        with pytest.raises(PeerUnreachable, match=r"has read nothing of what was sent to it for 0\.2 s"):
            raise error
        assert served.export.close(soon())
    assert [len(kind) for kind in pool._free] == free
    port.close(soon())
