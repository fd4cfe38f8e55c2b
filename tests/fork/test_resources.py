"""What runs out is an error that says so, on both sides, and nobody's process ends.

The limits are the system's own, in child processes. Each is tried with a little more, until a fork succeeds: so
everything that takes one of the resource has been the one that does not get it.
"""

import errno
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
import zmq
from engine_seeds import needs_mooncake
from processes import Child
from scarcity import SECONDS, close_under, fork_under, publish_under, publish_with
from seed_leases import until

import tensorfork
from tensorfork.exhaustion import exhausted, resources
from tensorfork.memory import cuda

pytestmark = pytest.mark.slow

NBYTES = 10_000
KINDS = ["cpu", "meta"]
STEPS = {"file descriptors": range(0, 200, 5), "threads": range(40), "Python's threads": range(40)}
"""How much more of each is tried."""
CALLED = {"Python's threads": "threads"}
SAID = {"threads": "can't start new thread", "file descriptors": "Too many open files"}
"""What the cause of a `TransferFailed` says."""


@pytest.fixture(scope="module")
def seed() -> Iterator[tensorfork.Seed]:
    model = {name: torch.ones(NBYTES, dtype=torch.uint8) for name in "abc"}
    with tensorfork.publish(model, transports=["zeromq", "gloo"]) as seed:
        yield seed


@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
@pytest.mark.parametrize("limit", STEPS)
def test_a_fork_that_lacks_something_says_what_and_leaves_the_model_as_it_was(
    seed: tensorfork.Seed, limit: str, transport: str
) -> None:
    resource, refused = CALLED.get(limit, limit), 0
    with Child(fork_under, seed.address, NBYTES) as child:
        for more in STEPS[limit]:
            kind = KINDS[more % 2]
            name, said, devices, kept = child.request("fork", limit, more, kind, transport)
            if name is None:
                break
            assert devices == {kind}
            if name == "TransferFailed":
                assert SAID[resource] in said
            else:
                assert (name, said, kept) == ("ResourceExhausted", resource, True)
                refused += 1
        assert refused > 1
        assert name is None, "with enough of it, the fork succeeds"
        until(lambda: not seed.stats().running, "every lease is given back")


@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
@pytest.mark.parametrize("limit", STEPS)
def test_a_seed_that_lacks_something_refuses_with_the_reason_and_serves_on(limit: str, transport: str) -> None:
    resource, refused, ours = CALLED.get(limit, limit), 0, {}
    with Child(publish_under, NBYTES) as child:
        address = child.recv()
        for more in STEPS[limit]:
            child.request("limit", limit, more)
            ours = {name: torch.zeros(NBYTES, dtype=torch.uint8) for name in "abc"}
            try:
                tensorfork.fork_into(ours, address, transport=transport, timeout=SECONDS)
                break
            except tensorfork.PeerRefused as error:
                assert resource in str(error)  # noqa: PT017
                refused += 1
            except (tensorfork.TransportUnavailable, tensorfork.TransferFailed):
                assert transport == "gloo", "whose groups are created under the lease"
            finally:
                child.request("lift")
            until(lambda: child.request("running") == 0, "the lease's slot is free")
        assert refused > 0
        assert all(bool((tensor == 1).all()) for tensor in ours.values())
        assert tensorfork.fork(address, transport=transport, timeout=SECONDS).keys() == ours.keys()


@pytest.mark.parametrize("transport", ["zeromq", "gloo"])
@pytest.mark.parametrize("limit", STEPS)
def test_a_seed_that_lacks_something_can_be_closed_and_has_lost_no_slot(limit: str, transport: str) -> None:
    with Child(close_under, NBYTES, limit, transport) as child:
        address = child.recv()
        for _ in range(3):  # without any descriptor nobody can connect
            with suppress(tensorfork.PeerRefused, tensorfork.PeerUnreachable, tensorfork.TransportUnavailable):
                tensorfork.fork(address, transport=transport, timeout=SECONDS)
        assert child.request("close") == (0, 0)


@pytest.mark.parametrize("transport", ["gloo", pytest.param("transfer_engine:tcp", marks=needs_mooncake)])
def test_a_library_that_lacks_descriptors_under_a_lease_does_not_end_the_seed_s_process(
    transport: str,
) -> None:
    with Child(publish_under, NBYTES, (), [transport]) as child:
        address = child.recv()
        for more in (2, 3, 4, 6, 10, 20):
            child.request("limit", "file descriptors", more)
            with pytest.raises(tensorfork.PeerRefused, match="file descriptors"):
                tensorfork.fork(address, transport=transport, timeout=SECONDS)
            child.request("lift")
            until(lambda: child.request("running") == 0, "the lease's slot is free")
        assert len(tensorfork.fork(address, transport=transport, timeout=SECONDS)) == len("abc")


@pytest.mark.parametrize("limit", STEPS)
def test_publishing_without_enough_of_something_says_what(limit: str) -> None:
    resource, refused = CALLED.get(limit, limit), 0
    with Child(publish_with, NBYTES) as child:
        for more in STEPS[limit]:
            name, said = child.request(limit, more, False)
            if name is None:
                break
            assert (name, said) == ("ResourceExhausted", resource)
            refused += 1
        assert refused > 0
        assert name is None, "with enough of it, the model is published"


MUCH = 256 << 20


def test_a_fork_without_memory_for_the_model_says_so_and_the_model_stays_as_it_was() -> None:
    model = {name: torch.ones(MUCH // 4, dtype=torch.uint8) for name in "abc"}
    with tensorfork.publish(model) as seed, Child(fork_under, seed.address, MUCH // 4) as child:
        outcome = child.request("fork", "memory", MUCH // 2, "meta", "zeromq")
        assert outcome == ("ResourceExhausted", "memory", {"meta"}, True)
        assert child.request("fork", "memory", 8 * MUCH, "meta", "zeromq")[0] is None
        until(lambda: not seed.stats().running, "no lease was taken, or it is given back")


def test_a_snapshot_without_memory_for_it_says_so() -> None:
    with Child(publish_with, MUCH // 4) as child:
        assert child.request("memory", MUCH // 2, True) == ("ResourceExhausted", "memory")
        assert child.request("memory", 8 * MUCH, True)[0] is None


# What others raise.

WANTS = [
    (MemoryError(), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "memory"),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        "memory",
    ),
    (RuntimeError("CUDA error: out of memory"), "memory"),
    (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
    (cuda.DriverError("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)"), "memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
    (OSError(errno.EMFILE, "Too many open files"), "file descriptors"),
    (OSError(errno.ENFILE, "Too many open files in system"), "file descriptors"),
    (zmq.ZMQError(errno.EMFILE), "file descriptors"),
    (RuntimeError("can't start new thread"), "threads"),
    (RuntimeError("Resource temporarily unavailable"), "threads"),
]


@pytest.mark.parametrize(("raised", "resource"), WANTS, ids=lambda one: str(one)[:30])
def test_what_says_that_something_has_run_out_is_one_kind_of_error(raised: Exception, resource: str) -> None:
    with pytest.raises(tensorfork.ResourceExhausted, match=resource) as caught, resources():
        raise raised
    assert caught.value.resource == resource
    assert caught.value.__cause__ is raised
    behind = tensorfork.TransportUnavailable("no group could be created")
    behind.__cause__ = raised
    found = exhausted(behind)
    assert found is not None
    assert found.resource == resource


@pytest.mark.parametrize("raised", [
    ValueError("out of range"), OSError(errno.ECONNREFUSED, "Connection refused"), zmq.ZMQError(zmq.EADDRINUSE),
    RuntimeError("CUDA error: an illegal memory access was encountered"), tensorfork.TransferFailed("out of memory"),
], ids=lambda one: str(one)[:30])  # fmt: skip
def test_other_errors_stay_what_they_are(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, resources():
        raise raised
    assert caught.value is raised
    assert exhausted(raised) is None
