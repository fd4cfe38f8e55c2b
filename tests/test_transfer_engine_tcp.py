"""Real forks over Mooncake's TCP, most of which something happens to."""

import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from processes import Child

import tensorfork
from tensorfork import Copy, PeerUnreachable, Region, RemoteRegion, Site, TransferFailed, TransportUnavailable
from tensorfork.testing.ends import Speaker
from tensorfork.transports.transfer_engine import TransferEngine, engine, library
from tensorfork.transports.transfer_engine.export import Offer, OfferedRegion
from tensorfork.transports.transfer_engine.quarantine import quarantine

SOON, LATE = 60.0, 20.0


def _why_no_mooncake() -> str | None:
    try:
        library.wheel()
        library.load()
    except TransportUnavailable as error:
        return str(error)
    return None


_without = _why_no_mooncake()
pytestmark = pytest.mark.skipif(_without is not None, reason=f"needs Mooncake: {_without}")

OFFERED = ["transfer_engine:tcp"]
BIG = 80 << 20
"""More reads of 1 MiB than two windows have room for: when the first has arrived, some are still to be begun."""


def tensors(count: int, nbytes: int, value: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors in storages of their own, each full of one value; by default each of another."""
    return {
        f"t{i}": torch.full((nbytes,), i % 251 if value is None else value, dtype=torch.uint8) for i in range(count)
    }


def empty(count: int, nbytes: int) -> dict[str, torch.Tensor]:
    return tensors(count, nbytes, 255)


def small_pieces() -> TransferEngine:
    return TransferEngine(fabric="tcp", piece=1 << 20)


def seeds(pipe: Connection) -> None:
    """Do what is asked, and answer, until told to end.

    ("publish", count, nbytes) -> the address of a seed; ("map", nbytes) -> the address of one whose memory ("free",
    close_first) takes away; ("registered",) -> how many registrations there are.
    """
    kept: list[Any] = []
    mapped: list[tuple[tensorfork.Seed, int, int]] = []
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            break
        if what == "publish":
            model = tensors(*args)
            kept.append(tensorfork.publish(model, transports=OFFERED))
            pipe.send(kept[-1].address)
        elif what == "map":
            memory = mmap.mmap(-1, args[0])
            kept.append(memory)
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            mapped.append((tensorfork.publish({"t0": tensor}, transports=OFFERED), tensor.data_ptr(), args[0]))
            pipe.send(mapped[-1][0].address)
        elif what == "free":
            seed, start, nbytes = mapped.pop()
            kept.append(seed)
            if args[0]:
                seed.close()
            assert _libc().munmap(start, nbytes) == 0
            pipe.send("freed")
        elif what == "registered":
            pipe.send(len(engine.engine("tcp", "127.0.0.1").spans))
    for one in kept:
        if isinstance(one, tensorfork.Seed):
            one.close()
    os._exit(0)  # what was unmapped must not be unmapped again by those who made it


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


@pytest.fixture(scope="module")
def shared() -> Iterator[Child]:
    """A process that publishes what it is asked to."""
    with Child(seeds) as child:
        yield child


@pytest.fixture
def seed(shared: Child) -> Iterator[Child]:
    """That process, which may be stopped."""
    yield shared
    shared.go_on()
    until(lambda: not quarantine.stretches())


class When:
    """A progress callback that does something when the first bytes have arrived."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self._do: Callable[[], Any] | None = do

    def __call__(self, moved: int, total: int) -> None:
        if moved and self._do is not None:
            do, self._do = self._do, None
            do()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def right(model: dict[str, torch.Tensor]) -> bool:
    return all(bool((tensor == i % 251).all()) for i, tensor in enumerate(model.values()))


# Sizes and numbers.


@pytest.mark.parametrize(("count", "nbytes"), [(1, 1), (3000, 4000), (17_000, 300)])
def test_any_number_of_tensors_arrives_and_nothing_stays_registered(seed: Child, count: int, nbytes: int) -> None:
    model = empty(count, nbytes)
    address = seed.ask("publish", count, nbytes)
    report = tensorfork.fork_into(model, address, transport="transfer_engine:tcp", timeout=SOON)
    assert (report.transport, report.fabric, report.verified) == ("transfer_engine", "tcp", True)
    assert right(model)
    until(lambda: seed.ask("registered") == 0)


def test_two_forks_read_at_once_while_the_seed_publishes_a_second_model(seed: Child) -> None:
    address = seed.ask("publish", 8, 1 << 20)
    models = [empty(8, 1 << 20) for _ in range(2)]
    both = threading.Barrier(2)
    published: list[str] = []

    def progress(moved: int, total: int) -> None:
        if not moved and both.wait(SOON) == 0:
            published.append(seed.ask("publish", 4, 5000))

    def read(model: dict[str, torch.Tensor]) -> None:
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON, progress=progress)

    threads = [threading.Thread(target=read, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert all(map(right, models))
    second = empty(4, 5000)
    tensorfork.fork_into(second, published[0], transport="transfer_engine:tcp", timeout=SOON)
    assert right(second)


def test_a_fork_publishes_again_and_a_draft_that_shares_a_tensor_outlives_its_target(seed: Child) -> None:
    target = empty(3, 100_000)
    tensorfork.fork_into(target, seed.ask("publish", 3, 100_000), transport="transfer_engine:tcp", timeout=SOON)
    draft = {"t0": target["t0"]}
    one = tensorfork.publish(target, transports=OFFERED)
    other = tensorfork.publish(draft, transports=[TransferEngine(fabric="tcp", keep_registered=True)])
    copies = empty(3, 100_000), empty(1, 100_000), empty(1, 100_000)
    tensorfork.fork_into(copies[0], one.address, transport="transfer_engine:tcp", timeout=SOON)
    tensorfork.fork_into(copies[1], other.address, transport="transfer_engine:tcp", timeout=SOON)
    one.close()
    tensorfork.fork_into(copies[2], other.address, transport="transfer_engine:tcp", timeout=SOON)
    assert all(map(right, copies))
    spans = engine.engine("tcp", "127.0.0.1").spans
    until(lambda: len(spans) == 1)
    other.close()
    assert len(spans) == 0


def test_a_rate_limit_bounds_what_is_asked_for(seed: Child) -> None:
    address, rate, seen = seed.ask("publish", 1, BIG), 4e6, list[int]()
    limited = TransferEngine(fabric="tcp", rate_limit=rate)
    started = time.monotonic()
    with pytest.raises(TransferFailed, match="deadline"):
        tensorfork.fork_into(
            empty(1, BIG), address, transport=limited, timeout=3.0, progress=lambda moved, total: seen.append(moved)
        )
    assert 0 < max(seen) <= rate * (time.monotonic() - started + 0.1)


# Who may.


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
    if library.wheel().cuda:
        pytest.skip("this wheel is for GPUs")
    with pytest.raises(TransportUnavailable, match="without NVLink"):
        engine.Engine("nvlink", "127.0.0.1", ())


# The seed dies, stops, or takes its memory away.


def test_a_seed_killed_under_way_fails_the_fork_and_the_next_seed_is_read_with_the_same_engine(seed: Child) -> None:
    model = empty(1, BIG)
    with Child(seeds) as other:
        address = other.ask("publish", 1, BIG)
        with pytest.raises((TransferFailed, PeerUnreachable)):
            tensorfork.fork_into(model, address, transport=small_pieces(), timeout=LATE, progress=When(other.kill))
    used = engine.engine("tcp", "127.0.0.1")
    until(lambda: not quarantine.stretches())
    tensorfork.fork_into(model, seed.ask("publish", 1, BIG), transport=small_pieces(), timeout=SOON)
    assert right(model)
    assert engine.engine("tcp", "127.0.0.1") is used


def test_what_a_stopped_seed_may_still_write_is_kept_alive_until_that_is_over(seed: Child) -> None:
    address, model = seed.ask("publish", 1, BIG), empty(1, BIG)
    start, storage = model["t0"].data_ptr(), model["t0"].untyped_storage()
    with pytest.raises(TransferFailed, match="deadline") as caught:
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=3.0, progress=When(seed.stop))
    undrained = set(caught.value.undrained)
    assert undrained
    assert all(start <= address and address + nbytes <= start + BIG for address, nbytes in undrained)
    assert set(quarantine.stretches()) <= undrained
    kept = [memory for ward in quarantine._wards for owner in ward.keep for memory in owner.keep]
    assert [one.data_ptr() for one in kept] == [storage.data_ptr()]
    seed.go_on()
    until(lambda: not quarantine.stretches())
    tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON)
    assert right(model)


def test_a_fork_into_memory_that_may_still_be_written_waits_for_that(seed: Child) -> None:
    address, model = seed.ask("publish", 1, BIG), empty(1, BIG)
    with pytest.raises(TransferFailed):
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=3.0, progress=When(seed.stop))
    good = tensorfork.publish(tensors(1, BIG), transports=OFFERED)
    bad = tensorfork.publish(model, transports=OFFERED)
    with good, bad:
        with pytest.raises(TransferFailed, match="may still be writing"):
            tensorfork.fork_into(model, good.address, transport=small_pieces(), timeout=1.0)
        with pytest.raises(TransportUnavailable, match="may still be writing"):
            tensorfork.fork_into(empty(1, BIG), bad.address, transport=small_pieces(), timeout=SOON)
        seed.go_on()
        tensorfork.fork_into(model, good.address, transport=small_pieces(), timeout=SOON)
    assert right(model)


@pytest.mark.parametrize("close_first", [True, False], ids=["after closing", "without a word"])
def test_memory_freed_under_way_fails_the_fork_and_the_seeds_process_lives(seed: Child, close_first: bool) -> None:
    address, free = seed.ask("map", BIG), When(lambda: seed.ask("free", close_first))
    with pytest.raises(tensorfork.TensorForkError):
        tensorfork.fork_into(
            empty(1, BIG), address, transport=small_pieces(), timeout=LATE, verify=False, progress=free
        )
    model = empty(1, 1000)
    tensorfork.fork_into(model, seed.ask("publish", 1, 1000), transport="transfer_engine:tcp", timeout=SOON)
    assert right(model)


@pytest.fixture
def silent() -> Iterator[bytes]:
    """The offer of a seed that takes connections and never answers, as one that is stopped does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        yield Offer("tcp", b"silent..", bytes(8), port, {0: OfferedRegion(1 << 20, ())}).pack()


def test_a_seed_that_is_silent_when_it_is_met_costs_the_deadline_and_the_engine_is_replaced(silent: bytes) -> None:
    used = engine.engine("tcp", "127.0.0.1")
    with pytest.raises(TransportUnavailable, match="did not answer by the deadline"):
        _open(silent, seconds=0.5)
    assert used.broken
    assert engine.engine("tcp", "127.0.0.1") is not used
    with tensorfork.publish(tensors(1, 1000), transports=OFFERED) as other:
        model = empty(1, 1000)
        tensorfork.fork_into(model, other.address, transport="transfer_engine:tcp", timeout=SOON)
        assert right(model)


def _open(offer: bytes, seconds: float = SOON) -> tuple[tensorfork.Session, torch.Tensor]:
    into = torch.zeros(1000, dtype=torch.uint8)
    ours = Region(0, into.data_ptr(), 1000, "cpu", into)
    remote, channel = [RemoteRegion(0, 1000, "cpu")], Speaker(lambda _: None)
    fork = TransferEngine(fabric="tcp")
    return fork.open(offer, "127.0.0.1", remote, [ours], channel, time.monotonic() + seconds), into


def test_memory_that_is_not_registered_any_more_is_refused_and_the_engine_reads_on() -> None:
    memory = torch.full((1000,), 7, dtype=torch.uint8)
    region = Region(0, memory.data_ptr(), 1000, "cpu", memory)
    transport = TransferEngine(fabric="tcp")
    exports = [
        transport.export([region], Site("127.0.0.1", "127.0.0.1"), transport.facts([region]), time.monotonic() + SOON)
        for _ in range(2)
    ]
    session, into = _open(exports[0].offer)
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


def test_closing_a_lease_says_whether_its_reader_has_said_that_it_is_done() -> None:
    memory = torch.zeros(1000, dtype=torch.uint8)
    region = Region(0, memory.data_ptr(), 1000, "cpu", memory)
    transport = TransferEngine(fabric="tcp")
    for speaks in (True, False):
        export = transport.export(
            [region], Site("127.0.0.1", "127.0.0.1"), transport.facts([region]), time.monotonic() + SOON
        )
        at_seed = Speaker(lambda _: None)
        serving = threading.Thread(target=export.serve, args=(at_seed,))
        serving.start()
        session = transport.open(
            export.offer,
            "127.0.0.1",
            [RemoteRegion(0, 1000, "cpu")],
            [],
            Speaker(at_seed.hear if speaks else lambda _: None),
            time.monotonic() + SOON,
        )
        session.close(time.monotonic() + SOON)
        at_seed.end()
        assert export.close(time.monotonic() + SOON) is speaks
        serving.join(SOON)
        assert not serving.is_alive()


# The process ends, forks, or is interrupted.


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that can use the names of this module."""
    head = f"import os, sys, threading, torch, tensorfork\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    head += "from test_transfer_engine_tcp import *\n"
    body = textwrap.indent(textwrap.dedent(program), "    ")
    return subprocess.run(
        [sys.executable, "-c", f"{head}if __name__ == '__main__':\n{body}"],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )


def test_nothing_reaches_the_terminal_even_when_a_read_is_refused() -> None:
    ended = run(
        """
        with tensorfork.publish(tensors(2, 1000), transports=OFFERED) as seed:
            tensorfork.fork_into(empty(2, 1000), seed.address, transport="transfer_engine:tcp")
        test_memory_that_is_not_registered_any_more_is_refused_and_the_engine_reads_on()
        print("fine")
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")


def test_python_ends_while_one_thread_reads_and_another_meets_a_silent_seed(silent: bytes) -> None:
    ended = run(
        f"""
        memory, reading = torch.zeros(2, dtype=torch.uint8), threading.Event()
        region = tensorfork.Region(0, memory.data_ptr(), 1, "cpu", memory)
        used = engine.engine("tcp", "127.0.0.1")
        held = used.spans.hold([region], time.monotonic() + SOON)

        def read():
            while True:
                number = used.read(f"127.0.0.1:{{used.port}}", region.address + 1, region.address, 1, "cpu", 1e9)
                while used.outcome(number) is engine.Outcome.RUNNING:
                    reading.set()

        threading.excepthook = lambda args: None  # it is told that the process is ending
        threading.Thread(target=read, daemon=True).start()
        assert reading.wait(60)
        other = engine.Engine("tcp", "127.0.0.1", ())
        try:
            other.meet(lambda: other.read("127.0.0.1:{Offer.unpack(silent).port}", 0, 0, 1, "cpu", 1e9), 0)
        except TransferFailed:
            os.write(1, b"ending\\n")
        """
    )
    assert (ended.returncode, ended.stdout) == (0, "ending\n"), ended.stderr


def test_an_engine_is_not_used_in_a_forked_process() -> None:
    ended = run(
        """
        seed = tensorfork.publish(tensors(1, 1000), transports=OFFERED)
        tensorfork.fork_into(empty(1, 1000), seed.address, transport="transfer_engine:tcp")
        before = engine.engine("tcp", "127.0.0.1")
        child = os.fork()
        if not child:
            fresh = engine.engine("tcp", "127.0.0.1")
            try:
                before.read("127.0.0.1:1", 0, 0, 1, "cpu", time.monotonic() + 1)
            except tensorfork.TransferFailed as error:
                print(fresh is not before, "os.fork" in str(error), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        tensorfork.fork_into(empty(1, 1000), seed.address, transport="transfer_engine:tcp")
        seed.close()
        """
    )
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr


def test_control_c_ends_a_fork_and_leaves_nothing_under_way(seed: Child) -> None:
    model, address = empty(1, BIG), seed.ask("publish", 1, BIG)
    interrupt = When(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON, progress=interrupt)
    until(lambda: not quarantine.stretches())
    tensorfork.fork_into(model, address, transport=small_pieces(), timeout=SOON)
    assert right(model)
