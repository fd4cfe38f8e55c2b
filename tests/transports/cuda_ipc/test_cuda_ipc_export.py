"""The offer of a CUDA IPC lease, and how little a seed does for each; the driver is a fake."""

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Sequence

import pytest
from fake_driver import Driver
from mapped_memory import PAGE, MappedMemory

from tensorfork import Export, Region, RemoteRegion, Site, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.memory import cuda
from tensorfork.testing.channel import QueueChannel
from tensorfork.transports.cuda_ipc import CudaIpc, IpcExport, offer

SITE = Site("127.0.0.1", "127.0.0.1")
ELSEWHERE = {"process": b"another"}
GIVEN = [Region(0, 0x1800, 8, "cuda:0"), Region(1, 0x2000, 8, "cuda:0"), Region(2, 0x100, 64, "cpu")]


class Owner:
    """Owns memory."""


class Gpu:
    """A GPU, and the addresses whose handles were exported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = Driver({0x1000: (0x1000, 7, True), 0x2000: (0x1000, 8, True)})
        self.exported: list[int] = []

        def export_handle(address: int, device: int) -> bytes:
            self.exported.append(address)
            found = self.driver.find(address)
            assert found is not None
            return bytes([found[1][1]]) * cuda.HANDLE_BYTES

        monkeypatch.setattr(cuda, "driver", lambda: self.driver)
        monkeypatch.setattr(cuda, "device_uuid", lambda device: device)
        monkeypatch.setattr(cuda, "export_ipc_handle", export_handle)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def published() -> tuple[CudaIpc, Sequence[Region]]:
    made = CudaIpc()
    made.facts(GIVEN)
    return made, made.cover(GIVEN)[0]


def lease(made: CudaIpc, regions: Sequence[Region]) -> Export:
    return made.export(regions, SITE, ELSEWHERE, time.monotonic() + 60)


def handles(export: Export, regions: Sequence[Region]) -> list[bytes | None]:
    """The offered handles, as a fork in another process reads them."""
    remote = [RemoteRegion(one.id, one.nbytes, one.device) for one in regions]
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(process, "_random", bytes(8))
        return [source.handle for source in offer.read_offer(export.offer, remote)[1].values()]


def test_a_lease_after_the_first_only_checks_that_each_allocation_is_still_the_same(gpu: Gpu) -> None:
    made, regions = published()
    first = lease(made, regions)
    assert gpu.exported == [0x1000, 0x2000]
    gpu.driver.queries.clear()
    assert lease(made, regions).offer is first.offer
    assert gpu.driver.queries == ["id", "id"]
    assert gpu.exported == [0x1000, 0x2000]


def test_memory_that_is_mapped_anew_is_refused_until_it_is_published_and_then_has_another_handle(gpu: Gpu) -> None:
    made, regions = published()
    assert handles(lease(made, regions), regions) == [b"\7" * cuda.HANDLE_BYTES, b"\10" * cuda.HANDLE_BYTES]
    gpu.driver.memory[0x1000] = 0x1000, 9, True
    with pytest.raises(TransportUnavailable, match="publish again"):
        lease(made, regions)
    made.facts(GIVEN)
    assert handles(lease(made, regions), regions) == [b"\11" * cuda.HANDLE_BYTES, b"\10" * cuda.HANDLE_BYTES]


def test_two_seeds_with_one_transport_have_their_own_offers(gpu: Gpu) -> None:
    made, regions = published()
    other = made.cover(GIVEN[1:])[0]
    assert len(handles(lease(made, regions), regions)) == 2
    assert handles(lease(made, other), other) == [b"\10" * cuda.HANDLE_BYTES]
    assert len(handles(lease(made, regions), regions)) == 2


def test_a_seed_that_has_closed_is_not_kept_alive_and_takes_nothing_from_another(gpu: Gpu) -> None:
    made, regions = published()
    owner = Owner()
    kept = weakref.ref(owner)
    closed = [
        Region(0, 0x1000, 0x2000, "cuda:0", owner)
    ]  # longer than an allocation, so that `cover` returns it with its owner
    made.facts(closed)
    lease(made, made.cover(closed)[0])
    made.forget(closed)
    del closed, owner
    assert kept() is None
    gpu.driver.memory[0x1000] = 0x1000, 9, True
    with pytest.raises(TransportUnavailable, match="publish again"):
        lease(made, regions)


def test_a_fork_in_the_same_process_gets_no_handles(gpu: Gpu) -> None:
    made, regions = published()
    local = made.export(regions, SITE, made.facts(GIVEN), time.monotonic() + 60)
    remote = [RemoteRegion(one.id, one.nbytes, one.device) for one in regions]
    same, sources = offer.read_offer(local.offer, remote)
    assert same
    assert [source.handle for source in sources.values()] == [None, None]
    assert gpu.exported == []


# Tensors on the CPU, which travel over the lease's channel.


class Served:
    """An export of regions on the CPU, which a test asks for bytes."""

    def __init__(self, *regions: Region) -> None:
        self.channel, theirs = QueueChannel(lambda _: None), QueueChannel(lambda _: None)
        self.channel.connect(theirs.deliver)
        theirs.connect(self.channel.deliver)
        self._export = IpcExport(regions, b"")
        self._thread = threading.Thread(target=self._export.serve, args=(theirs,))

    def ask(self, request: bytes) -> bytes:
        self.channel.send(request, time.monotonic() + 60)
        return self.channel.recv(time.monotonic() + 60)

    def __enter__(self) -> "Served":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.send(offer.RELEASED, time.monotonic() + 60)
        self._thread.join()
        assert self._export.close(time.monotonic() + 60)


def test_only_what_was_published_of_a_cpu_region_is_sent() -> None:
    content = os.urandom(1000)
    buffer = ctypes.create_string_buffer(content, 1000)
    with Served(Region(4, ctypes.addressof(buffer), 1000, "cpu", buffer, [(100, 200), (300, 600)])) as served:
        for offset, nbytes in ((100, 100), (300, 300), (150, 1)):
            assert served.ask(offer.CPU_REQUEST.pack(4, offset, nbytes)) == content[offset : offset + nbytes]
        for offset, nbytes in ((0, 1), (99, 2), (199, 2), (250, 1), (150, 200), (599, 2), (600, 1), (0, 1000)):
            assert served.ask(offer.CPU_REQUEST.pack(4, offset, nbytes)) == offer.STOP


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"x",
        bytes(23),
        bytes(25),
        offer.CPU_REQUEST.pack(5, 0, 1),
        offer.CPU_REQUEST.pack(4, 0, 0),
        offer.CPU_REQUEST.pack(4, 0, 1001),
        offer.CPU_REQUEST.pack(4, (1 << 64) - 1, 2),
        offer.CPU_REQUEST.pack(4, 0, (1 << 64) - 1),
    ],
    ids=repr,
)
def test_a_request_that_makes_no_sense_is_refused_and_the_next_is_answered(request_bytes: bytes) -> None:
    content = os.urandom(1000)
    buffer = ctypes.create_string_buffer(content, 1000)
    with Served(Region(4, ctypes.addressof(buffer), 1000, "cpu", buffer)) as served:
        assert served.ask(request_bytes) == offer.STOP
        assert served.ask(offer.CPU_REQUEST.pack(4, 0, 1000)) == content


def test_cpu_memory_that_is_gone_is_refused_and_the_rest_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    with MappedMemory(3) as memory, Served(Region(4, memory.address, memory.nbytes, "cpu")) as served:
        content = bytes(memory.tensor[:PAGE].tolist())
        memory.unmap(1)
        assert served.ask(offer.CPU_REQUEST.pack(4, PAGE - 1, 2)) == offer.STOP
        assert served.ask(offer.CPU_REQUEST.pack(4, 0, PAGE)) == content
    assert "cannot be read any more" in caplog.text
