"""Threads open CUDA IPC handles, those requested last first; the driver is a fake."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
from attrs import define, field

import tensorfork
from tensorfork.memory import cuda
from tensorfork.transports.cuda_ipc.handles import OPENER_THREADS, RemoteHandles
from tensorfork.transports.cuda_ipc.offer import RemoteAllocation

SOON = 20.0


@define
class Driver:
    """Opens handle ``b"7"`` at address 1007, when `gate` is open."""

    bad: set[int] = field(factory=set)
    opened: list[int] = field(factory=list)
    closed: list[int] = field(factory=list)
    refuses: set[int] = field(factory=set)
    gate: threading.Event = field(factory=threading.Event)
    reached: threading.Event = field(factory=threading.Event)

    def open_handle(self, handle: bytes) -> int:
        number = int(handle)
        self.reached.set()
        assert self.gate.wait(SOON)
        if number in self.bad:
            raise cuda.DriverError(f"no {number}")
        self.opened.append(1000 + number)
        return 1000 + number

    def close_handle(self, address: int) -> None:
        self.closed.append(address)
        if address in self.refuses:
            raise cuda.DriverError(f"not {address}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    for name, value in {
        "open_ipc_handle": fake.open_handle,
        "close_ipc_handle": fake.close_handle,
        "current_context": lambda device: nullcontext(),
        "relaxed_capture": nullcontext,
        "relax_capture": lambda: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    yield fake
    fake.gate.set()


def sources(count: int) -> dict[int, RemoteAllocation]:
    return {i: RemoteAllocation(i, 1, str(i).encode()) for i in range(count)}


def soon() -> float:
    return time.monotonic() + SOON


def test_every_requested_handle_is_opened_once_and_closed(driver: Driver) -> None:
    driver.gate.set()
    handles = RemoteHandles(sources(20))
    handles.request([(i, 0) for i in range(20)])
    assert [handles.address(i, 0, soon()) for i in range(20)] == [1000 + i for i in range(20)]
    handles.request([(i, 0) for i in range(20)])
    handles.close(soon())
    assert sorted(driver.opened) == [1000 + i for i in range(20)]
    assert sorted(driver.closed) == sorted(driver.opened)


def test_handles_that_are_read_no_more_are_closed_early_each_once(driver: Driver) -> None:
    driver.gate.set()
    handles = RemoteHandles({**sources(6), 6: RemoteAllocation(7777, 1, None)})
    handles.request([(i, 0) for i in range(7)])
    for i in range(7):
        handles.address(i, 0, soon())
    handles.close_early([0, 1, 6])
    handles.close_early([1, 2])
    handles.close(soon())
    assert sorted(driver.closed[:2]) == [1000, 1001]
    assert driver.closed[2] == 1002
    assert sorted(driver.closed) == [1000 + i for i in range(6)]
    assert not [one for one in threading.enumerate() if one.name == "tensorfork-ipc-close"]


def test_the_handles_requested_last_are_opened_first(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorfork.transports.cuda_ipc.handles.OPENER_THREADS", 1)
    handles = RemoteHandles(sources(6))
    handles.request([(i, 0) for i in range(6)])
    assert driver.reached.wait(SOON)
    handles.request([(5, 0), (4, 0), (0, 0)])
    driver.gate.set()
    for i in range(6):
        handles.address(i, 0, soon())
    assert driver.opened == [1000, 1005, 1004, 1001, 1002, 1003]
    handles.close(soon())


def test_two_handles_are_opened_at_the_same_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(OPENER_THREADS)
    open_handle = driver.open_handle
    monkeypatch.setattr(cuda, "open_ipc_handle", lambda handle: (barrier.wait(SOON), open_handle(handle))[1])
    driver.gate.set()
    count = 2 * OPENER_THREADS
    handles = RemoteHandles(sources(count))
    handles.request([(i, 0) for i in range(count)])
    assert [handles.address(i, 0, soon()) for i in range(count)] == [1000 + i for i in range(count)]
    handles.close(soon())


def test_while_copies_are_enqueued_no_handle_begins_to_be_opened_and_then_one_at_a_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_progress, most = list[bytes](), list[int]()
    open_handle = driver.open_handle

    def opening(handle: bytes) -> int:
        in_progress.append(handle)
        most.append(len(in_progress))
        try:
            return open_handle(handle)
        finally:
            in_progress.remove(handle)

    monkeypatch.setattr(cuda, "open_ipc_handle", opening)
    handles = RemoteHandles(sources(40))
    handles.request([(i, 0) for i in range(40)])
    while len(most) < OPENER_THREADS:
        assert driver.reached.wait(SOON)
    with handles.paused():
        driver.gate.set()  # those in progress end, and no other begins
        for i in range(OPENER_THREADS):
            handles.address(i, 0, soon())
        while len(handles._openers) > 1:
            assert driver.reached.wait(SOON)
        assert len(most) == OPENER_THREADS
    for i in range(40):
        handles.address(i, 0, soon())
    assert set(most[OPENER_THREADS:]) == {1}
    handles.close(soon())
    assert sorted(driver.closed) == [1000 + i for i in range(40)]


def test_a_thread_that_cannot_be_started_leaves_nothing_that_cannot_be_closed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = sys.getswitchinterval()
    handles = RemoteHandles(sources(3))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            handles.request([(0, 0), (1, 0)])
    handles.close(soon())
    assert sys.getswitchinterval() == usual


def test_handles_of_one_gpu_are_opened_there_after_those_of_another_failed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorfork.transports.cuda_ipc.handles.OPENER_THREADS", 1)
    where: list[int] = []
    on: list[tuple[int, list[int]]] = []

    @contextmanager
    def current(device: int) -> Iterator[None]:
        if device == 1:
            raise cuda.DriverError("no such GPU")
        where.append(device)
        yield
        where.remove(device)

    open_handle = driver.open_handle
    monkeypatch.setattr(cuda, "current_context", current)
    monkeypatch.setattr(
        cuda, "open_ipc_handle", lambda handle: (on.append((int(handle), list(where))), open_handle(handle))[1]
    )
    driver.gate.set()
    handles = RemoteHandles(sources(3))
    handles.request([(0, 0), (1, 1), (2, 0)])
    assert handles.address(2, 0, soon()) == 1002
    with pytest.raises(tensorfork.TransportUnavailable, match="no such GPU"):
        handles.address(1, 1, soon())
    handles.close(soon())
    assert on == [(0, [0]), (2, [0])]


def test_close_works_while_opening_is_paused(driver: Driver) -> None:
    driver.gate.set()
    handles = RemoteHandles(sources(40))
    with handles.paused():
        handles.request([(i, 0) for i in range(40)])
        openers = list(handles._openers)
        handles.close(soon())
    assert not any(opener.is_alive() for opener in openers)
    assert sorted(driver.closed) == sorted(driver.opened)


def test_a_handle_that_cannot_be_opened_fails_only_the_caller_that_needs_it(driver: Driver) -> None:
    driver.bad.add(1)
    driver.gate.set()
    handles = RemoteHandles(sources(4))
    handles.request([(i, 0) for i in range(4)])
    assert handles.address(3, 0, soon()) == 1003
    with pytest.raises(tensorfork.TransportUnavailable, match="cannot be opened on cuda:0: no 1"):
        handles.address(1, 0, soon())
    handles.close(soon())
    assert sorted(driver.closed) == [1000, 1002, 1003]


def test_a_driver_that_hangs_costs_the_deadline_and_what_it_opens_late_is_closed(driver: Driver) -> None:
    handles = RemoteHandles(sources(3))
    handles.request([(i, 0) for i in range(3)])
    with pytest.raises(tensorfork.TransferFailed, match="by the deadline"):
        handles.address(0, 0, time.monotonic() + 0.05)
    openers, short = list(handles._openers), sys.getswitchinterval()
    handles.close(time.monotonic())
    assert not driver.closed
    assert sys.getswitchinterval() > short  # restored, though calls hang
    driver.gate.set()
    for opener in openers:
        opener.join(SOON)
    assert sorted(driver.closed) == sorted(driver.opened) == [1000, 1001]


def test_a_handle_that_cannot_be_closed_leaves_the_others_closed(driver: Driver) -> None:
    driver.refuses.add(1000)
    driver.gate.set()
    handles = RemoteHandles(sources(3))
    handles.request([(i, 0) for i in range(3)])
    for i in range(3):
        handles.address(i, 0, soon())
    handles.close(soon())
    assert sorted(driver.closed) == [1000, 1001, 1002]


def test_an_eighth_of_the_requested_handles_can_be_waited_for(driver: Driver) -> None:
    handles = RemoteHandles({i: RemoteAllocation(1, 1, b"%d" % i) for i in range(3)})
    handles.wait_for_first(time.monotonic() + SOON)  # nothing is requested yet
    handles.request([(2, 0), (1, 0)])
    with pytest.raises(tensorfork.TransferFailed):
        handles.wait_for_first(time.monotonic() + 0.05)
    driver.gate.set()
    handles.wait_for_first(time.monotonic() + SOON)
    assert driver.opened
    handles.close(time.monotonic() + SOON)


def test_an_eighth_is_more_than_one_if_many_are_requested(driver: Driver) -> None:
    handles = RemoteHandles(sources(80))
    handles.request([(i, 0) for i in range(80)])
    driver.gate.set()
    handles.wait_for_first(soon())
    assert len(handles._addresses) >= 10
    handles.close(soon())


def test_waiting_for_the_first_handles_raises_the_error_of_one_that_cannot_be_opened(driver: Driver) -> None:
    driver.bad.add(2)
    driver.gate.set()
    handles = RemoteHandles({2: RemoteAllocation(1, 1, b"2")})
    handles.request([(2, 0)])
    for _ in range(2):  # whether the error is known by now or not
        with pytest.raises(tensorfork.TransportUnavailable, match="no 2"):
            handles.wait_for_first(time.monotonic() + SOON)
    handles.close(time.monotonic() + SOON)


def test_whoever_waits_for_a_handle_that_does_not_open_can_be_told_to_stop(driver: Driver) -> None:
    """As a fork that is cancelled is."""
    asked: list[str] = []

    def stop() -> None:
        asked.append("a")
        if len(asked) % 2 == 0:
            raise tensorfork.LeaseEnded("cancelled")

    handles = RemoteHandles(sources(2))
    handles.request([(0, 0), (1, 0)])
    with pytest.raises(tensorfork.LeaseEnded):
        handles.wait_for_first(soon(), stop)
    with pytest.raises(tensorfork.LeaseEnded):
        handles.address(0, 0, soon(), stop)
    assert len(asked) == 4
    driver.gate.set()
    handles.close(soon())
