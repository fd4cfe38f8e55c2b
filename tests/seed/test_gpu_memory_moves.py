"""GPU memory that is unmapped, freed or mapped anew under a seed's tensors, and under a fork's; on two GPUs.

Seed and fork are processes of their own, so that a fault ends one of them and not the tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from gpu_processes import fork_process, seed_process
from processes import Child

pytestmark = [pytest.mark.gpu(2), pytest.mark.slow]

VIRTUAL = ["zeromq", "nccl", "transfer_engine:tcp"]
"""Transports that move memory of cuMemCreate."""
MALLOC = ["cuda_ipc", "transfer_engine:nvlink", "nccl", "zeromq"]
EVERY = [*(("virtual", one) for one in VIRTUAL), *(("malloc", one) for one in MALLOC)]
RATE = 16e6
"""Bytes a second, of 48 MiB: a fork with this limit takes seconds."""
ONE_SIDED = ["cuda_ipc", "transfer_engine:nvlink", "transfer_engine:tcp"]
"""Their forks read by themselves: they must go on, slowly, to hear that the seed ends the lease. Others may hang."""


@contextmanager
def processes(kind: str, transport: str) -> Iterator[tuple[Child, Child]]:
    with Child(seed_process, kind, transport) as seed, Child(fork_process, 1, kind) as fork:
        seed.recv()
        fork.recv()
        yield seed, fork


def done(child: Child, *command: Any) -> Any:
    """The result of a command that succeeds."""
    outcome, *result = child.request(*command)
    assert outcome == "done", result
    return result[0]


def fork_now(
    seed: Child, fork: Child, transport: str, then: str = "", rate: float | None = None, **options: Any
) -> Any:
    return fork.request("fork", done(seed, "address"), transport, rate, then, options)


def begin_fork(seed: Child, fork: Child, transport: str, then: str, rate: float | None = None, **options: Any) -> None:
    """Have the fork begin; its first bytes have arrived when this returns."""
    fork.send("fork", done(seed, "address"), transport, rate, then, options)
    assert fork.recv() == "begun"


def check_both_go_on(seed: Child, fork: Child, transport: str) -> None:
    """Both processes live and use their GPUs, and fork whatever is published now."""
    assert done(seed, "alive") == done(fork, "alive") == 1000
    assert fork_now(seed, fork, transport) == ("done", True)


@pytest.mark.parametrize(("kind", "transport"), EVERY)
def test_memory_that_was_unmapped_is_refused_and_the_seed_lives(kind: str, transport: str) -> None:
    with processes(kind, transport) as (seed, fork):
        assert fork_now(seed, fork, transport) == ("done", True)
        done(seed, "unmap")
        outcome, error, text = fork_now(seed, fork, transport)
        assert (outcome, error) == ("raised", "SeedMoved"), text
        assert "not mapped any more" in text
        done(seed, "map")
        done(seed, "rescan")
        check_both_go_on(seed, fork, transport)


@pytest.mark.parametrize("transport", VIRTUAL)
def test_memory_that_was_mapped_anew_at_the_same_address_is_refused_until_it_is_published(transport: str) -> None:
    with processes("virtual", transport) as (seed, fork):
        assert fork_now(seed, fork, transport) == ("done", True)
        done(seed, "unmap")
        done(seed, "map")
        outcome, error, text = fork_now(seed, fork, transport)
        assert (outcome, error) == ("raised", "SeedMoved"), text
        assert "mapped anew" in text
        done(seed, "rescan")
        check_both_go_on(seed, fork, transport)


@pytest.mark.parametrize("kind", ["virtual", "malloc"])
def test_memory_that_is_unmapped_between_two_copies_ends_the_fork_and_not_the_seed(kind: str) -> None:
    with processes(kind, "zeromq") as (seed, fork):
        assert fork_now(seed, fork, "zeromq") == ("done", True)  # afterwards the seed has its digests
        done(seed, "unmap at read", 5)
        outcome, error, text = fork_now(seed, fork, "zeromq")
        assert (outcome, error) == ("raised", "SeedMoved"), text
        assert done(seed, "alive") == 1000
        done(seed, "map")
        done(seed, "rescan")
        check_both_go_on(seed, fork, "zeromq")


def test_memory_that_is_freed_while_a_fork_has_it_open_is_found_moved_at_the_end() -> None:
    """The fork's handle keeps the memory itself, so it reads what was there."""
    with processes("malloc", "cuda_ipc") as (seed, fork):
        begin_fork(seed, fork, "cuda_ipc", "wait", RATE)
        done(seed, "unmap")
        fork.send("go on")
        outcome, error, text = fork.recv()
        assert (outcome, error) == ("raised", "SeedMoved"), text
        done(seed, "map")
        done(seed, "rescan")
        check_both_go_on(seed, fork, "cuda_ipc")


@pytest.mark.parametrize(("kind", "transport"), EVERY)
def test_a_fork_into_memory_that_is_not_mapped_is_an_error_and_it_lives(kind: str, transport: str) -> None:
    with processes(kind, transport) as (seed, fork):
        done(fork, "unmap")
        outcome, error, text = fork_now(seed, fork, transport, clear=False)
        assert (outcome, error) == ("raised", "UnsupportedTensor"), text
        done(fork, "map")
        check_both_go_on(seed, fork, transport)


@pytest.mark.parametrize(("kind", "transport"), [("malloc", "cuda_ipc"), ("malloc", "zeromq"), ("virtual", "zeromq")])
def test_a_fork_whose_own_memory_is_unmapped_between_two_copies_fails_and_lives(kind: str, transport: str) -> None:
    with processes(kind, transport) as (seed, fork):
        outcome, error, text = fork_now(seed, fork, transport, "unmap", RATE, verify=False)
        assert (outcome, error) == ("raised", "TransferFailed"), text
        assert done(fork, "alive") == 1000
        done(fork, "map")
        check_both_go_on(seed, fork, transport)


@pytest.mark.parametrize(("kind", "transport"), EVERY)
def test_a_seed_is_suspended_under_way_unmapped_mapped_and_resumed(kind: str, transport: str) -> None:
    with processes(kind, transport) as (seed, fork):
        limited = transport in ONE_SIDED
        begin_fork(seed, fork, transport, "say" if limited else "wait", RATE if limited else None)
        seconds = done(seed, "suspend", 5.0)
        assert seconds < 5
        assert done(seed, "running") == 0
        free = done(seed, "free")
        done(seed, "unmap")
        if transport != "transfer_engine:nvlink":  # there the fork's process keeps the memory until it ends
            assert done(seed, "free") - free >= 48 << 20
        if not limited:
            fork.send("go on")
        outcome, error, text = fork.recv()
        assert (outcome, error) == ("raised", "SeedAsleep"), text
        assert fork_now(seed, fork, transport)[:2] == ("raised", "SeedAsleep")
        done(seed, "map")
        done(seed, "resume")
        check_both_go_on(seed, fork, transport)


@pytest.mark.parametrize("transport", MALLOC)
def test_what_is_replaced_under_way_is_free_within_a_second(transport: str) -> None:
    with processes("torch", transport) as (seed, fork):
        limited = transport in ONE_SIDED
        begin_fork(seed, fork, transport, "say" if limited else "wait", RATE if limited else None)
        assert done(seed, "replace") < 1.5
        if not limited:
            fork.send("go on")
        outcome, error, text = fork.recv()
        assert (outcome, error) == ("raised", "SeedChanged"), text
        check_both_go_on(seed, fork, transport)
