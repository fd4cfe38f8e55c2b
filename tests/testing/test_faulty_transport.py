"""`FaultyTransport`, its faults, and the suite's guarded memory."""

import threading
import time

import pytest
import torch
from broken_transports import harness_for, with_fault

import tensorfork
from tensorfork import Region, RemoteRegion
from tensorfork.testing import Fault, FaultyTransport, faults
from tensorfork.testing.guarded_memory import GuardedMemory
from tensorfork.transports.zeromq import ZeroMQ


def test_faults_in_memory_of_other_devices_need_a_function_that_reaches_it() -> None:
    with pytest.raises(ValueError, match="give FaultyTransport a memory="):
        faults.bytes_of(Region(0, 1, 1, "xpu:0"))


def test_a_faulty_transport_has_the_name_of_the_one_it_wraps() -> None:
    faulty = FaultyTransport(ZeroMQ(), Fault(), piece=17)
    assert (faulty.name, faulty.piece) == ("zeromq", 17)
    assert FaultyTransport(ZeroMQ(), Fault()).piece == ZeroMQ.piece


def test_faults_find_their_copy_in_any_pull_of_a_session() -> None:
    with harness_for(with_fault(lambda: faults.Flip(copy=2))) as (_, harness), harness.lease([30], [30]) as lease:
        first, second, third, fourth = lease.stripes(4)
        lease.pull([first, second])
        with pytest.raises(AssertionError, match="before it is there"):
            lease.try_pull([third, fourth])


def test_a_stop_ends_when_it_is_cancelled() -> None:
    cancel = threading.Event()
    with harness_for(with_fault(lambda: faults.StopAfter(10))) as (_, harness), harness.lease([30], [30]) as lease:
        started = time.monotonic()
        error = lease.fail(lease.stripes(3), cancel=cancel, then=lambda _: cancel.set())
        assert "cancelled" in str(error)
        assert time.monotonic() - started < 5


def test_guarded_memory_names_the_first_byte_that_differs() -> None:
    memory = GuardedMemory("cpu", [100, 50], 1)
    assert memory.first_difference() is None
    region = memory.regions[1]
    memory.view(1, 49, 1).bitwise_not_()
    assert "byte 49 of region 1" in str(memory.first_difference())
    assert memory.first_difference(ignore=[(region.address + 49, 1)]) is None
    assert memory.first_difference(ignore=[(region.address + 48, 1)]) is not None
    memory.poison()
    assert memory.first_difference() is None


def test_remote_regions_have_no_addresses() -> None:
    assert {field.name for field in RemoteRegion.__attrs_attrs__} == {"id", "nbytes", "device"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fault",
    [
        faults.SwapWords(copy=0, first=0, second=1000),
        faults.ZeroPage(page=9),
        faults.StalePage(page=9),
        faults.Shift(by=0),
    ],
    ids=str,
)
def test_a_fault_that_would_change_nothing_is_an_error(fault: Fault) -> None:
    with tensorfork.publish({"x": torch.arange(100)}) as seed:
        ours = {"x": torch.zeros(100, dtype=torch.int64)}
        with pytest.raises(tensorfork.TransferFailed, match="copy") as raised:
            tensorfork.fork_into(ours, seed.address, transport=FaultyTransport(ZeroMQ(), fault), timeout=20)
    assert isinstance(raised.value.__cause__, IndexError | ValueError)
