"""Real forks over Mooncake's TCP, most of them with a failure under way."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from engine_seeds import (
    BIG,
    OFFERED,
    SOON,
    OnFirstBytes,
    empty,
    has_expected_values,
    needs_mooncake,
    seeds,
    silent_engine,
    small_pieces,
    tensors,
    wait_until,
)
from processes import Child

import tensorfork
from tensorfork import Copy, PeerUnreachable, Region, RemoteRegion, Site, TransferFailed, TransportUnavailable
from tensorfork.testing.channel import QueueChannel
from tensorfork.transports.transfer_engine import TransferEngine, engine, library
from tensorfork.transports.transfer_engine.undrained import undrained_reads

pytestmark = needs_mooncake
LATE = 20.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Child]:
    """A process that publishes what it is asked to."""
    with Child(seeds) as child:
        yield child


@pytest.fixture
def seed(shared: Child) -> Iterator[Child]:
    """That process, which may be stopped."""
    yield shared
    shared.resume()
    wait_until(lambda: not undrained_reads.ranges())


# Sizes and numbers.


@pytest.mark.parametrize(("count", "nbytes"), [(1, 1), (3000, 4000), (17_000, 300)])
def test_any_number_of_tensors_arrives_and_nothing_stays_registered(seed: Child, count: int, nbytes: int) -> None:
    model = empty(count, nbytes)
    address = seed.request("publish", count, nbytes)
    report = tensorfork.fork_into(model, address, transport="transfer_engine:tcp", timeout=SOON)
    assert (report.transport, report.fabric, report.verified) == ("transfer_engine", "tcp", True)
    assert has_expected_values(model)
    wait_until(lambda: seed.request("registered") == 0)


def test_two_forks_read_at_once_while_the_seed_publishes_a_second_model(seed: Child) -> None:
    address = seed.request("publish", 8, 1 << 20)
    models = [empty(8, 1 << 20) for _ in range(2)]
    both = threading.Barrier(2)
    published: list[str] = []

    def progress(moved: int, total: int) -> None:
        if not moved and both.wait(SOON) == 0:
            published.append(seed.request("publish", 4, 5000))

    def read(model: dict[str, torch.Tensor]) -> None:
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON, progress=progress)

    threads = [threading.Thread(target=read, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert all(map(has_expected_values, models))
    second = empty(4, 5000)
    tensorfork.fork_into(second, published[0], transport="transfer_engine:tcp", timeout=SOON)
    assert has_expected_values(second)


def test_a_fork_publishes_again_and_a_draft_that_shares_a_tensor_outlives_its_target(seed: Child) -> None:
    target = empty(3, 100_000)
    tensorfork.fork_into(target, seed.request("publish", 3, 100_000), transport="transfer_engine:tcp", timeout=SOON)
    draft = {"t0": target["t0"]}
    one = tensorfork.publish(target, transports=OFFERED)
    other = tensorfork.publish(draft, transports=[TransferEngine(fabric="tcp", keep_registered=True)])
    copies = empty(3, 100_000), empty(1, 100_000), empty(1, 100_000)
    tensorfork.fork_into(copies[0], one.address, transport="transfer_engine:tcp", timeout=SOON)
    tensorfork.fork_into(copies[1], other.address, transport="transfer_engine:tcp", timeout=SOON)
    one.close()
    tensorfork.fork_into(copies[2], other.address, transport="transfer_engine:tcp", timeout=SOON)
    assert all(map(has_expected_values, copies))
    registrations = engine.get_engine("tcp", "127.0.0.1").registrations
    wait_until(lambda: len(registrations) == 1)
    other.close()
    assert len(registrations) == 0


def test_a_rate_limit_bounds_what_is_asked_for(seed: Child) -> None:
    address, rate, seen = seed.request("publish", 1, BIG), 4e6, list[int]()
    limited = TransferEngine(fabric="tcp", rate_limit=rate)
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="deadline"):
        tensorfork.fork_into(
            empty(1, BIG), address, transport=limited, timeout=3.0, progress=lambda moved, total: seen.append(moved)
        )
    assert 0 < max(seen) <= rate * (time.monotonic() - started + 0.1)


# Which ports are opened.


def test_a_seed_that_does_not_name_tcp_does_not_open_its_ports() -> None:
    with tensorfork.publish(tensors(1, 100)) as seed:
        with pytest.raises(TransportUnavailable, match=r"publish there with transports=\['transfer_engine:tcp'\]"):
            tensorfork.fork_into(empty(1, 100), seed.address, transport="transfer_engine:tcp", timeout=SOON)
        with pytest.raises(TransportUnavailable, match=r"nvlink: .*rdma: the fork has no RDMA NIC"):
            tensorfork.fork_into(empty(1, 100), seed.address, transport="transfer_engine", timeout=SOON)


def test_rdma_without_a_nic_does_not_become_tcp() -> None:
    with pytest.raises(TransportUnavailable, match="cannot start on rdma"):
        engine.Engine("rdma", "127.0.0.1", ())


def test_nvlink_without_a_wheel_for_gpus_does_not_become_tcp() -> None:
    if library.installed_wheel().cuda:
        pytest.skip("this wheel is for GPUs")
    with pytest.raises(TransportUnavailable, match="without NVLink"):
        engine.Engine("nvlink", "127.0.0.1", ())


# The seed dies, stops, or takes its memory away.


def test_a_seed_killed_under_way_fails_the_fork_soon_and_the_engine_is_used_for_the_next_seed(seed: Child) -> None:
    model, failed = empty(1, BIG), 0.0
    with Child(seeds) as other:
        address = other.request("publish", 1, BIG)
        killed = OnFirstBytes(other.kill)
        with pytest.raises((TransferFailed, PeerUnreachable)):
            tensorfork.fork_into(model, address, transport=small_pieces(), timeout=300, progress=killed)
        failed = time.monotonic()
    assert failed - killed.called < LATE
    used = engine.get_engine("tcp", "127.0.0.1")
    wait_until(lambda: not undrained_reads.ranges())
    tensorfork.fork_into(model, seed.request("publish", 1, BIG), transport=small_pieces(), timeout=SOON)
    assert has_expected_values(model)
    assert engine.get_engine("tcp", "127.0.0.1") is used


def test_a_seed_killed_after_the_last_byte_fails_the_fork_long_before_its_deadline() -> None:
    model = empty(1, 3 << 20)
    with Child(seeds) as other:
        address = other.request("publish", 1, 3 << 20)
        killed = OnFirstBytes(other.kill, lambda moved, total: moved == total)
        with pytest.raises(PeerUnreachable, match="step check"):
            tensorfork.fork_into(model, address, transport=small_pieces(), timeout=300, progress=killed)
        assert time.monotonic() - killed.called < LATE


def test_memory_that_reads_from_a_stopped_seed_may_still_write_is_kept_alive_until_they_are_over(seed: Child) -> None:
    address, model = seed.request("publish", 1, BIG), empty(1, BIG)
    start, storage = model["t0"].data_ptr(), model["t0"].untyped_storage()
    with pytest.raises(TransferFailed, match="deadline") as caught:
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=3.0, progress=OnFirstBytes(seed.stop))
    undrained = set(caught.value.undrained)
    assert undrained
    assert all(start <= address and address + nbytes <= start + BIG for address, nbytes in undrained)
    assert set(undrained_reads.ranges()) <= undrained
    kept = [memory for one in undrained_reads._pending for owner in one.keep_alive for memory in owner.storages]
    assert [one.data_ptr() for one in kept] == [storage.data_ptr()]
    seed.resume()
    wait_until(lambda: not undrained_reads.ranges())
    tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON)
    assert has_expected_values(model)


def test_a_fork_into_memory_that_may_still_be_written_waits_until_it_is_not(seed: Child) -> None:
    address, model = seed.request("publish", 1, BIG), empty(1, BIG)
    with pytest.raises(TransferFailed):
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=3.0, progress=OnFirstBytes(seed.stop))
    good = tensorfork.publish(tensors(1, BIG), transports=OFFERED)
    bad = tensorfork.publish(model, transports=OFFERED)
    with good, bad:
        with pytest.raises(TransferFailed, match="may still be writing"):
            tensorfork.fork_into(model, good.address, transport=small_pieces(), timeout=1.0)
        with pytest.raises(TransportUnavailable, match="may still be writing"):
            tensorfork.fork_into(empty(1, BIG), bad.address, transport=small_pieces(), timeout=SOON)
        seed.resume()
        tensorfork.fork_into(model, good.address, transport=small_pieces(), timeout=SOON)
    assert has_expected_values(model)


@pytest.mark.parametrize("close_first", [True, False], ids=["after closing", "without a word"])
def test_memory_freed_under_way_fails_the_fork_and_the_seeds_process_lives(seed: Child, close_first: bool) -> None:
    address, free = seed.request("map", BIG), OnFirstBytes(lambda: seed.request("free", close_first))
    with pytest.raises(tensorfork.TensorForkError):
        tensorfork.fork_into(
            empty(1, BIG), address, transport=small_pieces(), timeout=LATE, verify=False, progress=free
        )
    model = empty(1, 1000)
    tensorfork.fork_into(model, seed.request("publish", 1, 1000), transport="transfer_engine:tcp", timeout=SOON)
    assert has_expected_values(model)


def test_a_seed_that_does_not_answer_costs_the_deadline_and_the_engine_is_replaced() -> None:
    used = engine.get_engine("tcp", "127.0.0.1")
    with silent_engine() as offer, pytest.raises(TransportUnavailable, match="did not answer by the deadline"):
        open_offer(offer, seconds=0.5)
    assert used.broken
    assert engine.get_engine("tcp", "127.0.0.1") is not used
    with tensorfork.publish(tensors(1, 1000), transports=OFFERED) as other:
        model = empty(1, 1000)
        tensorfork.fork_into(model, other.address, transport="transfer_engine:tcp", timeout=SOON)
        assert has_expected_values(model)


def open_offer(offer: bytes, seconds: float = SOON) -> tuple[tensorfork.Session, torch.Tensor]:
    into = torch.zeros(1000, dtype=torch.uint8)
    ours = Region(0, into.data_ptr(), 1000, "cpu", into)
    remote, channel = [RemoteRegion(0, 1000, "cpu")], QueueChannel(lambda _: None)
    fork = TransferEngine(fabric="tcp")
    return fork.open(offer, "127.0.0.1", remote, [ours], channel, time.monotonic() + seconds), into


def test_memory_that_is_not_registered_any_more_is_refused_and_the_engine_is_used_again() -> None:
    memory = torch.full((1000,), 7, dtype=torch.uint8)
    region = Region(0, memory.data_ptr(), 1000, "cpu", memory)
    transport = TransferEngine(fabric="tcp")
    exports = [
        transport.export([region], Site("127.0.0.1", "127.0.0.1"), transport.facts([region]), time.monotonic() + SOON)
        for _ in range(2)
    ]
    session, into = open_offer(exports[0].offer)
    copies = [Copy(0, 0, 0, 0, 0, 1000)]
    session.pull(copies, time.monotonic() + SOON, lambda _: None, threading.Event())
    assert (into == 7).all()
    for export in exports:
        export.close(time.monotonic() + SOON)
    with pytest.raises(TransferFailed, match="not registered"):
        session.pull(copies, time.monotonic() + LATE, lambda _: None, threading.Event())
    again = transport.export(
        [region], Site("127.0.0.1", "127.0.0.1"), transport.facts([region]), time.monotonic() + SOON
    )
    session.pull(copies, time.monotonic() + SOON, lambda _: None, threading.Event())
    again.close(time.monotonic() + SOON)


def test_closing_a_lease_tells_whether_its_fork_has_said_that_it_is_done() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)
    region = Region(0, memory.data_ptr(), 1000, "cpu", memory)
    transport = TransferEngine(fabric="tcp")
    for speaks in (True, False):
        export = transport.export(
            [region], Site("127.0.0.1", "127.0.0.1"), transport.facts([region]), time.monotonic() + SOON
        )
        at_seed = QueueChannel(lambda _: None)
        serving = threading.Thread(target=export.serve, args=(at_seed,))
        serving.start()
        session = transport.open(
            export.offer,
            "127.0.0.1",
            [RemoteRegion(0, 1000, "cpu")],
            [],
            QueueChannel(at_seed.deliver if speaks else lambda _: None),
            time.monotonic() + SOON,
        )
        session.close(time.monotonic() + SOON)
        at_seed.end()
        assert export.close(time.monotonic() + SOON) is speaks
        serving.join(SOON)
        assert not serving.is_alive()


def test_control_c_ends_a_fork_and_leaves_nothing_under_way(seed: Child) -> None:
    model, address = empty(1, BIG), seed.request("publish", 1, BIG)
    interrupt = OnFirstBytes(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON, progress=interrupt)
    wait_until(lambda: not undrained_reads.ranges())
    tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON)
    assert has_expected_values(model)
