"""Process groups of two: gloo here, nccl where there are two GPUs (`-m gpu`); the same tests for both where it can be.

What must be under way when something happens is held up by the seed's rate limit, never by sleeping.
"""

import gc
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Child

import tensorfork
from tensorfork import Copy, Site, TransferFailed, TransportUnavailable
from tensorfork.errors import PeerUnreachable, ProtocolError
from tensorfork.testing import TransportSuite
from tensorfork.testing.ends import Speaker
from tensorfork.testing.memory import Memory
from tensorfork.transports.nccl import NCCL, Gloo
from tensorfork.transports.nccl.lanes import GlooLane
from tensorfork.transports.nccl.memory import Memory as RegionsOfOneSide
from tensorfork.transports.nccl.memory import join
from tensorfork.transports.nccl.parcels import STRETCHES, Limits, pages, read_page, schedule
from tensorfork.transports.nccl.rendezvous import environment, reach_store, serve_store, together

LOOPBACK = Site("127.0.0.1", "127.0.0.1")
SECONDS = 60.0
"""A deadline that is kept with ease."""
SLOW = 4 << 20
"""Bytes a second, of a transfer in the middle of which something happens."""
MANY = 4 << 20
"""Bytes of such a transfer."""
LONG = {"gloo": 4.0, "nccl": 12.0}
"""Seconds for a fork with such a transfer; to make a communicator of NCCL's takes some."""


class TestGloo(TransportSuite):
    big = 16 << 20

    def make(self) -> tensorfork.Transport:
        return Gloo(parcel=1 << 20)


@pytest.mark.gpu(1)
class TestGlooWithAGPU(TransportSuite):
    devices = (("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0"))
    ways = ("from a spawned process",)
    big = 16 << 20

    def make(self) -> tensorfork.Transport:
        return Gloo(parcel=1 << 20, bucket=1 << 20)


@pytest.mark.gpu(2)
class TestNCCL(TransportSuite):
    devices = (("cuda:0", "cuda:1"),)
    big = 64 << 20
    short = 3.0
    seconds = SECONDS

    def make(self) -> tensorfork.Transport:
        return NCCL(parcel=2 << 20, bucket=1 << 20, small=64 << 10)


BACKENDS = [
    pytest.param(("gloo", "cpu", "cpu"), id="gloo"),
    pytest.param(("nccl", "cuda:0", "cuda:1"), id="nccl", marks=pytest.mark.gpu(2)),
]
Backend = tuple[str, str, str]


def transport(name: str, **options: Any) -> tensorfork.Transport:
    return NCCL(**options) if name == "nccl" else Gloo(**options)


def model(device: str, sizes: Sequence[int], seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors of bytes: the same for the same seed, or zeros."""
    draw = torch.Generator().manual_seed(seed or 0)
    made = {
        f"t{i}": torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=draw)
        if seed is not None
        else torch.zeros(nbytes, dtype=torch.uint8)
        for i, nbytes in enumerate(sizes)
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# Whole forks.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_all_sizes_is_forked(backend: Backend) -> None:
    name, there, here = backend
    sizes = [5 << 20, 300_000, 1, 7, 511, 1 << 20, 4097, 100_000]
    ours, theirs = model(here, sizes), model(there, sizes, 1)
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, transport=name, timeout=SECONDS)
    assert equal(ours, theirs)
    assert report.transport == name
    assert report.verified


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_small_tensors_are_forked(backend: Backend) -> None:
    name, there, here = backend
    draw = random.Random(1)
    sizes = [draw.randint(1, 3000) for _ in range(10_000)]
    ours, theirs = model(here, sizes), model(there, sizes, 2)
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport=name, timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_model_partly_on_the_cpu_is_forked_whole(device: str) -> None:
    sizes = [3 << 20, 70_000, 12]
    other = {"cuda:0": "cuda:1", "cuda:1": "cuda:0"}[device]
    theirs = model(device, sizes, 3) | {f"host.{k}": v for k, v in model("cpu", sizes, 4).items()}
    ours = model(other, sizes) | {f"host.{k}": v for k, v in model("cpu", sizes).items()}
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(2)
def test_a_model_leaves_the_gpu_and_comes_back_on_it() -> None:
    sizes = [3 << 20, 70_000, 12, 9 << 20]
    theirs = model("cuda:0", sizes, 5)
    ours = model("cuda:1", sizes[:2]) | dict(list(model("cpu", sizes).items())[2:])
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.gpu(4)
def test_a_model_on_two_gpus_is_forked_to_two_others() -> None:
    sizes = [30 << 20, 70_000, 12]
    theirs = {f"{d}.{k}": v for d in (0, 1) for k, v in model(f"cuda:{d}", sizes, 6 + d).items()}
    ours = {f"{d}.{k}": v for d in (0, 1) for k, v in model(f"cuda:{2 + d}", sizes).items()}
    with tensorfork.publish(theirs) as seed:
        tensorfork.fork_into(ours, seed.address, transport="nccl", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forks_at_once_do_not_meet(backend: Backend) -> None:
    name, there, here = backend
    sizes = [2 << 20, 5000, 1 << 20]
    theirs = model(there, sizes, 7)
    forks = [model(here, sizes) for _ in range(2)]
    errors: list[BaseException] = []

    def fork(into: dict[str, torch.Tensor], address: str) -> None:
        try:
            tensorfork.fork_into(into, address, transport=name, timeout=SECONDS)
        except BaseException as error:
            errors.append(error)

    with tensorfork.publish(theirs, transports=[transport(name, rate_limit=SLOW)]) as seed:
        threads = [threading.Thread(target=fork, args=(into, seed.address), daemon=True) for into in forks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert not errors
    assert all(equal(into, theirs) for into in forks)


def test_a_seed_and_a_fork_meet_over_ipv6() -> None:
    ours, theirs = model("cpu", [100_000]), model("cpu", [100_000], 8)
    try:
        seed = tensorfork.publish(theirs, bind="tcp://[::1]:*")
    except OSError:
        pytest.skip("this host has no IPv6")
    with seed:
        tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert equal(ours, theirs)


@pytest.mark.parametrize("bind", ["tcp://127.0.0.2:*", "tcp://localhost:*", "tcp://0.0.0.0:*"])
def test_a_seed_is_found_by_each_of_its_hosts_names(bind: str) -> None:
    ours, theirs = model("cpu", [100_000]), model("cpu", [100_000], 9)
    advertise = "localhost" if "127.0.0.2" not in bind else None
    with tensorfork.publish(theirs, bind=bind, advertise=advertise) as seed:
        tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert equal(ours, theirs)


def test_auto_says_why_it_passed_nccl_over() -> None:
    ours, theirs = model("cpu", [1000]), model("cpu", [1000], 10)
    with tensorfork.publish(theirs) as seed:
        report = tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
    assert report.transport == "zeromq"
    assert "NCCL" in report.passed_over["nccl"] or "GPU" in report.passed_over["nccl"]


# Beside the engine's own groups.


def in_the_default_group(pipe: Any, rank: int, store: str, name: str, device: str, address: str | None) -> None:
    """A process of an engine: reduces in its default group without pause, while it publishes or forks."""
    import torch.distributed as dist

    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(name, store=dist.FileStore(store, 2), rank=rank, world_size=2)
    before = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    enough, rounds = threading.Event(), 0

    def reduce() -> None:
        nonlocal rounds
        while True:
            sums = torch.tensor([rank + 1, int(enough.is_set())], device=device)
            dist.all_reduce(sums)
            assert int(sums[0]) == 3
            rounds += 1
            if int(sums[1]) == 2:
                return

    reducing = threading.Thread(target=reduce)
    reducing.start()
    sizes = [4 << 20, 1000, 200_000]
    if rank == 0:
        with tensorfork.publish(model(device, sizes, 11), transports=[transport(name)]) as seed:
            pipe.send(seed.address)
            pipe.recv()
        fine = True
    else:
        (address,) = pipe.recv()
        ours = model(device, sizes)
        tensorfork.fork_into(ours, address, transport=transport(name), timeout=SECONDS)
        fine = equal(ours, model("cpu", sizes, 11))
        pipe.send("forked")
    during = rounds
    enough.set()
    reducing.join(SECONDS)
    after = dict(os.environ), list(dist.distributed_c10d._world.pg_names.values())
    dist.destroy_process_group()
    pipe.send((fine, during > 0 and not reducing.is_alive(), before == after))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engines_default_group_works_on_meanwhile_and_is_not_touched(backend: Backend, tmp_path: Path) -> None:
    name, there, here = backend
    store = str(tmp_path / "store")
    with (
        Child(in_the_default_group, 0, store, name, there, None) as seed,
        Child(in_the_default_group, 1, store, name, here, None) as fork,
    ):
        fork.say(seed.hear())
        assert fork.hear() == "forked"
        seed.say("enough")
        assert seed.hear() == (True, True, True)
        assert fork.hear() == (True, True, True)


def test_the_environment_is_as_before_after_each_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORFORK_TEST_KEPT", "mine")
    monkeypatch.delenv("TENSORFORK_TEST_NEW", raising=False)
    before = dict(os.environ)
    with environment({"TENSORFORK_TEST_KEPT": "0", "TENSORFORK_TEST_NEW": "1"}):
        assert os.environ["TENSORFORK_TEST_KEPT"] == "0"
        assert os.environ["TENSORFORK_TEST_NEW"] == "1"
    assert dict(os.environ) == before


def test_a_fork_leaves_no_thread_file_or_variable_behind() -> None:
    ours, theirs = model("cpu", [100_000, 10]), model("cpu", [100_000, 10], 12)

    def once() -> None:
        with tensorfork.publish(theirs, transports=["gloo"]) as seed:
            tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
        gc.collect()

    once()
    before = dict(os.environ), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(3):
        once()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before[2])
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before[1])
    assert dict(os.environ) == before[0]


# A side dies, or stops.


def slow_seed(pipe: Any, name: str, device: str) -> None:
    """Publishes, slowly; says how many leases it has when asked."""
    with tensorfork.publish(model(device, [MANY], 13), transports=[transport(name, rate_limit=SLOW)]) as seed:
        pipe.send(seed.address)
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            computed = int((torch.ones(8, device=device) * 2).sum())  # the engine works on
            pipe.send((seed.stats().running, seed.stats().expired, computed))


def slow_fork(pipe: Any, name: str, device: str, address: str, seconds: float) -> None:
    """Forks, and says when bytes have arrived."""
    said: list[int] = []

    def progress(moved: int, total: int) -> None:
        if moved and not said:
            said.append(moved)
            pipe.send("under way")

    started = time.monotonic()
    try:
        tensorfork.fork_into(model(device, [MANY]), address, transport=fine(name), timeout=seconds, progress=progress)
    except tensorfork.TensorForkError as error:
        pipe.send((type(error).__name__, time.monotonic() - started))
    pipe.recv()


def fine(name: str) -> tensorfork.Transport:
    """One that reports progress often."""
    return transport(name, parcel=MANY // 16, bucket=MANY // 16, small=1000)


def whole_fork(name: str, device: str, address: str) -> None:
    ours = model(device, [MANY])
    tensorfork.fork_into(ours, address, transport=name, timeout=SECONDS)
    assert equal(ours, model("cpu", [MANY], 13))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_outlives_forks_that_are_stopped_and_killed_in_mid_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.hear()
        with (
            Child(slow_fork, name, here, address, LONG[name]) as stopped,
            Child(slow_fork, name, here, address, LONG[name]) as killed,
        ):
            assert stopped.hear() == "under way"
            stopped.stop()
            assert killed.hear() == "under way"
            killed.kill()
            whole_fork(name, here, address)  # while the others' leases may still run
            wait_until(lambda: seed.ask("leases")[0] == 0)
            assert seed.ask("leases")[2] == 16
        whole_fork(name, here, address)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_outlives_a_seed_that_is_stopped_and_one_that_is_killed_in_mid_transfer(backend: Backend) -> None:
    name, there, here = backend
    with Child(slow_seed, name, there) as seed:
        address = seed.hear()

        def fail(happen: Callable[[], None]) -> dict[str, torch.Tensor]:
            happened: list[int] = []

            def progress(moved: int, total: int) -> None:
                if moved and not happened:
                    happened.append(moved)
                    happen()

            ours = model(here, [MANY])
            started = time.monotonic()
            with pytest.raises(TransferFailed):
                tensorfork.fork_into(ours, address, transport=fine(name), timeout=LONG[name], progress=progress)
            assert time.monotonic() - started < LONG[name] + 6.0
            assert happened
            return ours

        ours = fail(seed.stop)
        kept = {k: v.clone() for k, v in ours.items()}
        seed.go_on()
        whole_fork(name, here, address)
        assert equal(ours, kept), "something was written after the failure"
        fail(seed.kill)
    with tensorfork.publish(model(there, [1000], 14)) as other:
        tensorfork.fork_into(model(here, [1000]), other.address, transport=name, timeout=SECONDS)


# The seed's end, spoken to directly.


@contextmanager
def served(export: tensorfork.Export, deaf_to: bytes | None = None) -> Iterator[tuple[Speaker, list[BaseException]]]:
    """An export that is served; the fork's end of its channel, and how serving ended. Ends like a lease.

    What has `deaf_to` in it does not reach the fork.
    """
    forks = Speaker(lambda _: None)
    mine = Speaker(lambda message: None if deaf_to and deaf_to in message else forks.hear(message))
    forks._say = mine.hear
    ended: list[BaseException] = []

    def serve() -> None:
        try:
            export.serve(mine)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield forks, ended
    finally:
        assert export.close(time.monotonic() + SECONDS)
        thread.join(SECONDS)
        assert not thread.is_alive()


def export(memory: Memory, seconds: float = SECONDS, **options: Any) -> tensorfork.Export:
    return Gloo(**options).export(memory.regions, LOOPBACK, {}, time.monotonic() + seconds)


def hear(speaker: Speaker) -> list[Any]:
    found: list[Any] = msgpack.unpackb(speaker.recv(time.monotonic() + SECONDS))
    return found


def say(speaker: Speaker, *words: Any) -> None:
    speaker.send(msgpack.packb(words), time.monotonic() + SECONDS)


@contextmanager
def opened(memory: Memory, into: Memory, speaker: Speaker, offer: bytes) -> Iterator[tensorfork.Session]:
    remote = [tensorfork.RemoteRegion(region.id, region.nbytes, region.device) for region in memory.regions]
    session = Gloo().open(offer, "127.0.0.1", remote, into.regions, speaker, time.monotonic() + SECONDS)
    try:
        yield session
    finally:
        session.close(time.monotonic() + SECONDS)


def test_a_fork_that_never_joins_costs_a_thread_until_the_lease_ends() -> None:
    with served(export(Memory("cpu", [1000], 1))) as (_, ended):
        pass
    assert not ended


def test_a_lease_whose_time_is_over_ends_by_itself() -> None:
    with served(export(Memory("cpu", [1000], 1), seconds=0.2)) as (_, ended):
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


def test_a_fork_that_says_it_joins_and_does_not_come_is_told_so() -> None:
    with served(export(Memory("cpu", [1000], 1), joining=0.3)) as (speaker, ended):
        say(speaker, "join", [["cpu", "cpu"]], [None, None, None], "127.0.0.1")
        assert hear(speaker) == ["ready"]
        assert hear(speaker)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "words",
    [
        ["parcels", True, b"short"],
        ["parcels", True, b"\x07\x00\x00\x00\x01\x00\x00\x00" + bytes(24)],
        ["join", [["cuda:9", "cpu"]], [None, None, None], "127.0.0.1"],
        ["join", [["cpu", "cpu"]], [None, 1000, None], "127.0.0.1"],
        ["join", [["cpu", "cpu"]] * 300, [None, None, None], "127.0.0.1"],
        ["join", "everything"],
        ["nonsense"],
        [1, 2],
    ],
    ids=[
        "half a page",
        "no such lane",
        "no such device",
        "many CTAs",
        "many lanes",
        "half a join",
        "nonsense",
        "numbers",
    ],
)
def test_a_fork_that_talks_nonsense_is_refused_and_the_seed_goes_on(words: list[Any]) -> None:
    with served(export(Memory("cpu", [1000], 1))) as (speaker, ended):
        say(speaker, *words)
        assert hear(speaker)[0] == "failed"
        wait_until(lambda: bool(ended))
    assert isinstance(ended[0], PeerUnreachable)


@pytest.mark.parametrize(
    "stretch", [(7, 0, 1001), (7, 1000, 1), (8, 0, 1), (7, (1 << 64) - 1, 2), (7, 0, (1 << 64) - 1)]
)
def test_a_fork_that_asks_for_other_memory_gets_none(stretch: tuple[int, int, int]) -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    memory_id = memory.regions[0].id
    made = export(memory)
    with served(made) as (speaker, ended), opened(memory, into, speaker, made.offer):
        id = memory_id if stretch[0] == 7 else 12345
        page = b"\x00\x00\x00\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, *stretch[1:]))
        say(speaker, "parcels", True, page)
        words = hear(speaker)
        assert words[0] == "failed"
        assert "outside" in words[1]
        wait_until(lambda: bool(ended))
    assert into.wrong() is None


def test_a_bucket_holds_no_more_than_the_seed_said() -> None:
    memory, into = Memory("cpu", [5000], 1), Memory("cpu", [5000], 2)
    made = export(memory, bucket=1000, small=1000)
    with served(made) as (speaker, _), opened(memory, into, speaker, made.offer):
        id = memory.regions[0].id
        say(
            speaker,
            "parcels",
            True,
            b"\x00\x00\x01\x00\x01\x00\x00\x00" + b"".join(n.to_bytes(8, "little") for n in (id, 0, 1001)),
        )
        words = hear(speaker)
        assert words[0] == "failed"
        assert "bucket" in words[1]


def test_a_pull_is_no_success_before_the_seed_has_said_so() -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    made = export(memory)
    with served(made, deaf_to=b"sent") as (speaker, _), opened(memory, into, speaker, made.offer) as session:
        copy = Copy(0, memory.regions[0].id, 0, into.regions[0].id, 0, 1000)
        with pytest.raises(TransferFailed, match="deadline"):
            session.pull([copy], time.monotonic() + 0.5, lambda _: None, threading.Event())


def test_a_pull_that_is_cancelled_when_its_last_copy_is_done_has_failed() -> None:
    memory, into = Memory("cpu", [1000], 1), Memory("cpu", [1000], 2)
    made, cancel = export(memory), threading.Event()
    with served(made) as (speaker, _), opened(memory, into, speaker, made.offer) as session:
        copy = Copy(0, memory.regions[0].id, 0, into.regions[0].id, 0, 1000)
        with pytest.raises(TransferFailed, match="cancelled"):
            session.pull([copy], time.monotonic() + SECONDS, lambda _: cancel.set(), cancel)


def test_a_connection_that_breaks_amid_a_message_is_noticed_at_once() -> None:
    nbytes = 64 << 20
    theirs, ours = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    with pair_of_lanes(theirs, ours) as (seed, fork):
        until = time.monotonic() + SECONDS
        sending = seed.begin([(0, 0, nbytes)], False, until)
        fork.begin([(0, 0, nbytes)], False, until)
        while not ours[0]:
            assert time.monotonic() < until
        fork.abort()
        started = time.monotonic()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(sending, lambda: None)
        assert time.monotonic() - started < SECONDS / 2
        arrived = ours.clone()
        with pytest.raises((RuntimeError, TransferFailed)):
            seed.finish(seed.begin([(0, 0, 1)], False, until), lambda: None)
        assert torch.equal(arrived, ours), "bytes came after an abort"


@contextmanager
def pair_of_lanes(theirs: torch.Tensor, ours: torch.Tensor) -> Iterator[tuple[GlooLane, GlooLane]]:
    """Two lanes over gloo that are connected, each with a region 0."""
    from torch.distributed import PrefixStore

    until = time.monotonic() + SECONDS
    _, store, port = serve_store("127.0.0.1", None, until)
    stores = [PrefixStore("x", one) for one in (store, reach_store("127.0.0.1", port, until))]

    def lane(rank: int, tensor: torch.Tensor) -> Callable[[], GlooLane]:
        memory = RegionsOfOneSide([tensorfork.Region(0, tensor.data_ptr(), tensor.nbytes, "cpu")])

        def make() -> GlooLane:
            made = GlooLane(stores[rank], rank, memory, "cpu", 1 << 20, "127.0.0.1", until)
            made.greet(until)
            return made

        return make

    lanes = together([lane(0, theirs), lane(1, ours)], GlooLane.close, "test-lane", lambda: None)
    try:
        yield lanes[0], lanes[1]
    finally:
        for one in lanes:
            one.close()


def test_a_transfer_that_was_aborted_and_returns_is_no_success() -> None:
    class Work:
        def wait(self, timeout: Any) -> bool:
            lane.aborted = True
            return True

    work = Work()
    lane = object.__new__(GlooLane)
    lane.aborted, lane._stream, lane._under_way = False, None, [work]
    with pytest.raises(TransferFailed):
        lane.finish(([work], (), None), lambda: None)


def test_a_seed_sends_no_faster_than_its_rate_limit() -> None:
    ours, theirs = model("cpu", [3 << 20]), model("cpu", [3 << 20], 15)
    with tensorfork.publish(theirs, transports=[Gloo(rate_limit=4 << 20)]) as seed:
        report = tensorfork.fork_into(ours, seed.address, transport="gloo", timeout=SECONDS)
    assert report.seconds["transfer"] > 0.6
    assert equal(ours, theirs)


# Ports.


def test_stores_listen_within_the_range_and_ports_are_free_again_afterwards() -> None:
    ports = free_range(2)
    memory = Memory("cpu", [1000], 1)
    for _ in range(2):
        first, second = export(memory, ports=ports), export(memory, ports=ports)
        assert {msgpack.unpackb(one.offer)[1] for one in (first, second)} == set(ports)
        with pytest.raises(TransportUnavailable, match="longer range"):
            export(memory, ports=ports)
        assert first.close(time.monotonic() + SECONDS)
        assert second.close(time.monotonic() + SECONDS)


def test_a_seed_listens_where_it_was_told_to_and_nowhere_else() -> None:
    made = export(Memory("cpu", [1000], 1))
    port = msgpack.unpackb(made.offer)[1]
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), SECONDS)
    made.close(time.monotonic() + SECONDS)


def free_range(length: int) -> range:
    """Ports that were free a moment ago."""
    for start in range(23_000, 60_000, 97):
        with ExitStack() as held:
            try:
                for port in range(start, start + length):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return range(start, start + length)
    raise AssertionError("there is no free range of ports")


# Refusals.


def test_nccl_refuses_a_model_that_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(TransportUnavailable, match="use gloo, or zeromq"):
        NCCL().facts(Memory("cpu", [10], 1).regions)


def test_nccl_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without NCCL"):
        NCCL().facts(Memory("cpu", [10], 1).regions)


def test_gloo_refuses_a_torch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(TransportUnavailable, match="built without gloo"):
        Gloo().facts(Memory("cpu", [10], 1).regions)


def test_gloo_refuses_a_host_without_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", list)
    with pytest.raises(TransportUnavailable, match="interface"):
        Gloo().facts(Memory("cpu", [10], 1).regions)


def test_memory_of_other_kinds_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="mps:0"):
        Gloo().facts([tensorfork.Region(0, 0, 10, "mps:0")])


GPU_FACTS = {"devices": ["cuda:0"], "gpus": ["GPU-a"], "version": [2, 27, 7]}


def test_nccl_refuses_two_processes_on_one_gpu() -> None:
    other = GPU_FACTS | {"gpus": ["GPU-b"]}
    assert NCCL().why_not(GPU_FACTS, other) is None
    assert "the same GPU" in str(NCCL().why_not(GPU_FACTS, GPU_FACTS | {"gpus": ["GPU-b", "GPU-a"]}))


def test_nccl_refuses_another_version_of_itself() -> None:
    other = GPU_FACTS | {"gpus": ["GPU-b"], "version": [2, 26, 2]}
    assert "2.27.7 here and 2.26.2" in str(NCCL().why_not(GPU_FACTS, other))


def test_asking_for_nccl_by_name_gives_the_reason() -> None:
    theirs = model("cpu", [1000], 16)
    with tensorfork.publish(theirs) as seed, pytest.raises(TransportUnavailable, match=r"NCCL|GPU"):
        tensorfork.fork_into(model("cpu", [1000]), seed.address, transport="nccl", timeout=SECONDS)


@pytest.mark.parametrize("options", [{"rate_limit": 0}, {"parcel": 0}, {"small": 0}, {"bucket": 10, "small": 11}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"bytes"):
        Gloo(**options)  # type: ignore[arg-type]


def test_an_offer_that_is_none_is_refused() -> None:
    for offer in (b"", b"\xc1", msgpack.packb(["token", 0, 1, 1, 1, [None] * 3, "host"]), msgpack.packb([1, 2])):
        with pytest.raises(ProtocolError, match="offer"):
            Gloo().open(offer, "127.0.0.1", [], [], Speaker(lambda _: None), time.monotonic() + SECONDS)


# What is pure.


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2)), max_size=20),
    limits=st.tuples(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 600)),
)
def test_parcels_hold_every_byte_once_and_keep_to_the_limits(
    sizes: list[tuple[int, int]], limits: tuple[int, int, int]
) -> None:
    copies, at = [], 0
    for nbytes, _ in sizes:
        copies.append(Copy(0, 5, 3 * at, 6, 7 * at, nbytes))
        at += nbytes
    lanes = [lane for _, lane in sizes]
    limit = Limits(*limits)
    parcels = schedule(copies, lanes, dict.fromkeys(range(3), limit))
    reached = [0] * len(copies)
    for parcel in parcels:
        assert 0 < len(parcel.copies) <= STRETCHES
        assert parcel.nbytes <= (limit.bucket if parcel.packed else limit.parcel)
        for i, (region, offset, nbytes), (into, start, also) in zip(
            parcel.copies, parcel.theirs, parcel.ours, strict=True
        ):
            assert (region, into, nbytes) == (5, 6, also)
            assert offset - copies[i].offset == start - copies[i].at == reached[i]
            assert parcel.lane == lanes[i]
            assert parcel.packed == (copies[i].nbytes < limit.small)
            reached[i] += nbytes
    assert reached == [copy.nbytes for copy in copies]
    read = [parcel for page, _ in pages(parcels) for parcel in read_page(page)]
    assert read == [(parcel.lane, parcel.packed, list(parcel.theirs)) for parcel in parcels]


def test_pages_are_bounded_and_count_their_parcels() -> None:
    copies = [Copy(0, 1, i * 10, 1, i * 10, 10) for i in range(60_000)]
    book = list(pages(schedule(copies, [0] * len(copies), {0: Limits(100, 100_000, 100)})))
    assert len(book) > 1
    assert all(len(page) <= 1 << 19 for page, _ in book)
    assert [count for _, count in book] == [len(read_page(page)) for page, _ in book]


def test_lanes_take_turns() -> None:
    copies = [Copy(0, 1, i * 100, 1, i * 100, 100) for i in range(8)]
    parcels = schedule(copies, [0] * 4 + [1] * 4, {0: Limits(100, 1, 1), 1: Limits(100, 1, 1)})
    assert [parcel.lane for parcel in parcels] == [0, 1] * 4


@given(st.binary(max_size=200))
def test_any_bytes_are_a_page_or_refused(page: bytes) -> None:
    try:
        read_page(page)
    except ProtocolError:
        return


def test_regions_that_touch_become_one_and_no_byte_is_added() -> None:
    regions = [
        tensorfork.Region(4, 1000, 100, "cpu"),
        tensorfork.Region(1, 1100, 50, "cpu"),
        tensorfork.Region(2, 1151, 10, "cpu"),
        tensorfork.Region(3, 1161, 10, "cuda:0"),
        tensorfork.Region(9, 1155, 3, "cpu"),
    ]
    joined, places = join(regions)
    assert [(one.id, one.address, one.nbytes) for one in joined] == [(4, 1000, 150), (2, 1151, 10), (3, 1161, 10)]
    assert [(place.region, place.offset) for place in places] == [(4, 0), (4, 100), (2, 0), (3, 0), (2, 4)]
