"""Leases with several devices on either side, and a group for each pair. GPUs are pretended; gloo moves the bytes."""

import ctypes
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gloo_leases import LOOPBACK, SECONDS, served

from tensorfork import Copy, Region, RemoteRegion, Session, TransferFailed
from tensorfork.transports.process_group import NCCL, export, region_tensors, session
from tensorfork.transports.process_group.gloo import GlooGroup
from tensorfork.transports.process_group.rendezvous import GroupStores, serve_store

EDGE = 64
"""Bytes before and after each region, which must stay as they are."""
NBYTES = 20_000
GPUS = [f"cuda:{i}" for i in range(3)]


@pytest.fixture(autouse=True)
def clients(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """Pretend that there are GPUs. Returns the clients of the store that each rank's groups got."""
    got: dict[int, list[Any]] = {0: [], 1: []}

    def as_tensor(region: Region) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_char * region.nbytes).from_address(region.address), dtype=torch.uint8)

    def create(
        pair: Any, store: Any, rank: int, regions: Any, settings: Any, address: str, deadline: float
    ) -> GlooGroup:
        got[rank].append(store.underlying_store)
        group = GlooGroup(store, rank, regions, "cpu", settings.bucket, address, deadline)
        group.handshake(deadline)
        return group

    monkeypatch.setattr(region_tensors, "region_bytes", as_tensor)
    monkeypatch.setattr(session, "create_group", create)
    monkeypatch.setattr(export, "create_group", create)
    monkeypatch.setattr(export, "warm_up_thread", lambda *_: None)
    return got


class Side:
    """A region of random bytes, or of zeros, on each of these devices."""

    def __init__(self, devices: Sequence[str], generator: torch.Generator | None) -> None:
        self.buffers = [torch.zeros(NBYTES + 2 * EDGE, dtype=torch.uint8) for _ in devices]
        if generator is not None:
            for buffer in self.buffers:
                buffer.random_(generator=generator)
        self.regions = [
            Region(5 + 2 * i, buffer.data_ptr() + EDGE, NBYTES, device, buffer)
            for i, (device, buffer) in enumerate(zip(devices, self.buffers, strict=True))
        ]

    def bytes_of(self, region: int, at: int, nbytes: int) -> bytes:
        start = EDGE + at
        return bytes(self.buffers[(region - 5) // 2][start : start + nbytes].tolist())


@contextmanager
def leased(theirs: Side, ours: Side, **options: int) -> Iterator[Session]:
    transport = NCCL(**options)
    offered = transport.export(theirs.regions, LOOPBACK, {}, time.monotonic() + SECONDS)
    remote = [RemoteRegion(region.id, region.nbytes, region.device) for region in theirs.regions]
    with served(offered) as (channel, _):
        deadline = time.monotonic() + SECONDS
        opened = transport.open(offered.offer, "127.0.0.1", remote, ours.regions, channel, deadline)
        try:
            opened.ready(deadline)
            yield opened
        finally:
            opened.close(deadline)


def random_copies(draw: random.Random, theirs: Side, ours: Side, sources: Sequence[Region]) -> list[Copy]:
    """Copies of random lengths, some 0, from anywhere in the sources to places of ours that do not overlap."""
    copies = []
    for into in ours.regions:
        at = 0
        while at < NBYTES:
            nbytes = min(draw.choice([0, 1, 7, 300, 3000]), NBYTES - at)
            source = draw.choice(sources)
            copies.append(Copy(0, source.id, draw.randint(0, NBYTES - nbytes), into.id, at, nbytes))
            at += nbytes + draw.choice([1, 5])
    draw.shuffle(copies)
    return copies


@pytest.mark.parametrize("seed", range(6))
def test_every_copy_goes_through_the_group_of_its_devices_and_arrives_whole(
    seed: int, clients: dict[int, list[Any]]
) -> None:
    draw = random.Random(seed)
    theirs, ours = Side(GPUS, torch.Generator().manual_seed(seed)), Side(GPUS[:2], None)
    with leased(theirs, ours, parcel=draw.choice([512, 1 << 20]), bucket=4096, small=draw.choice([1, 1000])) as opened:
        for sources in (theirs.regions[:1], theirs.regions):  # the second pull needs more groups
            copies, completed = random_copies(draw, theirs, ours, sources), list[int]()

            def done(i: int, copies: Sequence[Copy] = copies, completed: list[int] = completed) -> None:
                copy = copies[i]
                source = theirs.bytes_of(copy.region, copy.offset, copy.nbytes)
                assert ours.bytes_of(copy.into, copy.at, copy.nbytes) == source
                completed.append(i)

            opened.pull(copies, time.monotonic() + SECONDS, done, threading.Event())
            assert sorted(completed) == list(range(len(copies)))
    for buffer in ours.buffers:
        assert not buffer[:EDGE].any()
        assert not buffer[-EDGE:].any()
    for got in clients.values():
        assert len(got) == 6
        assert not any(one is other for i, one in enumerate(got) for other in got[:i])


@pytest.mark.parametrize(
    "bad",
    [
        Copy(0, 5, NBYTES - 9, 5, 0, 10),
        Copy(0, 5, -1, 5, 0, 10),
        Copy(0, 5, 1 << 64, 5, 0, 10),
        Copy(0, -1, 0, 5, 0, 10),
        Copy(0, 5, 0, 7, NBYTES - 9, 10),
        Copy(0, 5, 0, 7, -1, 10),
        Copy(0, 5, 0, 99, 0, 10),
    ],
    ids=[
        "past their end",
        "before them",
        "past all numbers",
        "no region",
        "past our end",
        "before ours",
        "none of ours",
    ],
)
@pytest.mark.parametrize("devices", [1, 2], ids=["one group", "two groups"])
def test_a_copy_that_fits_neither_side_fails_the_pull_and_touches_nothing_else(bad: Copy, devices: int) -> None:
    theirs, ours = Side(GPUS[:1], torch.Generator().manual_seed(1)), Side(GPUS[:devices], None)
    if devices == 1 and bad.into == 7:
        bad = Copy(0, bad.region, bad.offset, 5, bad.at, bad.nbytes)
    good = [Copy(0, 5, at, 5, at, 100) for at in range(100, 10_000, 100)]
    completed = list[int]()
    with leased(theirs, ours, parcel=512, small=1) as opened, pytest.raises(TransferFailed):
        opened.pull([*good, bad], time.monotonic() + SECONDS, completed.append, threading.Event())
    for i in completed:
        assert ours.bytes_of(5, good[i].at, 100) == theirs.bytes_of(5, good[i].offset, 100)
    for buffer in ours.buffers:
        assert not buffer[: EDGE + 100].any()
        assert not buffer[EDGE + 10_000 :].any()


def test_groups_share_no_client_of_the_store() -> None:
    deadline = time.monotonic() + SECONDS
    server, host, port = serve_store("127.0.0.1", None, deadline)
    stores = GroupStores(host, port, "token", deadline, lambda: None)
    taken = [*stores.take(2, deadline, lambda: None), *stores.take(1, deadline, lambda: None)]
    clients = [store.underlying_store for store in taken]
    assert len({id(client) for client in clients}) == 3
    waiting = threading.Thread(target=clients[0].get, args=("key",))
    waiting.start()
    clients[1].set("key", "value")
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    del server
