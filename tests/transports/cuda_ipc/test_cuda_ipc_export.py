"""The offer of a CUDA IPC lease, and how little a seed does for each; the driver is a fake."""

import time
import weakref
from collections.abc import Sequence

import pytest
from fake_driver import Driver

from tensorfork import Export, Region, RemoteRegion, Site, TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.memory import cuda
from tensorfork.transports.cuda_ipc import CudaIpc, offer

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
