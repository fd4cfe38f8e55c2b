"""Handles of CUDA IPC are opened on a thread, by whom they are wanted first; the driver is a fake."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
from attrs import define, field

import tensorfork
from tensorfork.memory import cuda
from tensorfork.transports.cuda_ipc.handles import OPENERS, RemoteHandles
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


def test_all_that_are_wanted_are_opened_once_and_closed(driver: Driver) -> None:
    driver.gate.set()
    mapped = RemoteHandles(sources(20))
    mapped.want([(i, 0) for i in range(20)])
    assert [mapped.address(i, 0, soon()) for i in range(20)] == [1000 + i for i in range(20)]
    mapped.want([(i, 0) for i in range(20)])
    mapped.close(soon())
    assert sorted(driver.opened) == [1000 + i for i in range(20)]
    assert sorted(driver.closed) == sorted(driver.opened)


def test_what_is_wanted_last_is_opened_first(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorfork.transports.cuda_ipc.handles.OPENERS", 1)
    mapped = RemoteHandles(sources(6))
    mapped.want([(i, 0) for i in range(6)])
    assert driver.reached.wait(SOON)
    mapped.want([(5, 0), (4, 0), (0, 0)])
    driver.gate.set()
    for i in range(6):
        mapped.address(i, 0, soon())
    assert driver.opened == [1000, 1005, 1004, 1001, 1002, 1003]
    mapped.close(soon())


def test_one_handle_is_opened_while_another_is(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(OPENERS)
    open_handle = driver.open_handle
    monkeypatch.setattr(cuda, "open_ipc_handle", lambda handle: (both.wait(SOON), open_handle(handle))[1])
    driver.gate.set()
    mapped = RemoteHandles(sources(2 * OPENERS))
    mapped.want([(i, 0) for i in range(2 * OPENERS)])
    assert [mapped.address(i, 0, soon()) for i in range(2 * OPENERS)] == [1000 + i for i in range(2 * OPENERS)]
    mapped.close(soon())


def test_while_copies_are_enqueued_no_handle_begins_to_be_opened_and_then_one_at_a_time(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = list[bytes](), list[int]()
    open_handle = driver.open_handle

    def opening(handle: bytes) -> int:
        under_way.append(handle)
        most.append(len(under_way))
        try:
            return open_handle(handle)
        finally:
            under_way.remove(handle)

    monkeypatch.setattr(cuda, "open_ipc_handle", opening)
    mapped = RemoteHandles(sources(40))
    mapped.want([(i, 0) for i in range(40)])
    while len(most) < OPENERS:
        assert driver.reached.wait(SOON)
    with mapped.pause():
        driver.gate.set()  # those under way end, and no other begins
        for i in range(OPENERS):
            mapped.address(i, 0, soon())
        while len(mapped._openers) > 1:
            assert driver.reached.wait(SOON)
        assert len(most) == OPENERS
    for i in range(40):
        mapped.address(i, 0, soon())
    assert set(most[OPENERS:]) == {1}
    mapped.close(soon())
    assert sorted(driver.closed) == [1000 + i for i in range(40)]


def test_a_thread_that_cannot_be_started_leaves_nothing_that_cannot_be_closed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = sys.getswitchinterval()
    mapped = RemoteHandles(sources(3))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            mapped.want([(0, 0), (1, 0)])
    mapped.close(soon())
    assert sys.getswitchinterval() == usual


def test_handles_of_one_gpu_are_opened_there_after_those_of_another_failed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorfork.transports.cuda_ipc.handles.OPENERS", 1)
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
    mapped = RemoteHandles(sources(3))
    mapped.want([(0, 0), (1, 1), (2, 0)])
    assert mapped.address(2, 0, soon()) == 1002
    with pytest.raises(tensorfork.TransportUnavailable, match="no such GPU"):
        mapped.address(1, 1, soon())
    mapped.close(soon())
    assert on == [(0, [0]), (2, [0])]


def test_a_pause_keeps_nobody_from_closing(driver: Driver) -> None:
    driver.gate.set()
    mapped = RemoteHandles(sources(40))
    with mapped.pause():
        mapped.want([(i, 0) for i in range(40)])
        openers = list(mapped._openers)
        mapped.close(soon())
    assert not any(opener.is_alive() for opener in openers)
    assert sorted(driver.closed) == sorted(driver.opened)


def test_what_cannot_be_opened_hurts_only_who_asks_for_it(driver: Driver) -> None:
    driver.bad.add(1)
    driver.gate.set()
    mapped = RemoteHandles(sources(4))
    mapped.want([(i, 0) for i in range(4)])
    assert mapped.address(3, 0, soon()) == 1003
    with pytest.raises(tensorfork.TransportUnavailable, match="cannot be opened on cuda:0: no 1"):
        mapped.address(1, 0, soon())
    mapped.close(soon())
    assert sorted(driver.closed) == [1000, 1002, 1003]


def test_a_driver_that_hangs_costs_the_deadline_and_what_it_opens_late_is_closed(driver: Driver) -> None:
    mapped = RemoteHandles(sources(3))
    mapped.want([(i, 0) for i in range(3)])
    with pytest.raises(tensorfork.TransferFailed, match="by the deadline"):
        mapped.address(0, 0, time.monotonic() + 0.05)
    openers, short = list(mapped._openers), sys.getswitchinterval()
    mapped.close(time.monotonic())
    assert not driver.closed
    assert sys.getswitchinterval() > short  # as it was before, though calls hang
    driver.gate.set()
    for opener in openers:
        opener.join(SOON)
    assert sorted(driver.closed) == sorted(driver.opened) == [1000, 1001]


def test_one_that_does_not_close_leaves_the_others_closed(driver: Driver) -> None:
    driver.refuses.add(1000)
    driver.gate.set()
    mapped = RemoteHandles(sources(3))
    mapped.want([(i, 0) for i in range(3)])
    for i in range(3):
        mapped.address(i, 0, soon())
    mapped.close(soon())
    assert sorted(driver.closed) == [1000, 1001, 1002]


def test_an_eighth_of_what_is_wanted_can_be_waited_for(driver: Driver) -> None:
    mapped = RemoteHandles({i: RemoteAllocation(1, 1, b"%d" % i) for i in range(3)})
    mapped.enough(time.monotonic() + SOON)  # nothing is wanted yet
    mapped.want([(2, 0), (1, 0)])
    with pytest.raises(tensorfork.TransferFailed):
        mapped.enough(time.monotonic() + 0.05)
    driver.gate.set()
    mapped.enough(time.monotonic() + SOON)
    assert driver.opened
    mapped.close(time.monotonic() + SOON)


def test_an_eighth_is_more_than_one_where_many_are_wanted(driver: Driver) -> None:
    mapped = RemoteHandles(sources(80))
    mapped.want([(i, 0) for i in range(80)])
    driver.gate.set()
    mapped.enough(soon())
    assert len(mapped._found) >= 10
    mapped.close(soon())


def test_a_first_that_cannot_be_opened_says_why(driver: Driver) -> None:
    driver.bad.add(2)
    driver.gate.set()
    mapped = RemoteHandles({2: RemoteAllocation(1, 1, b"2")})
    mapped.want([(2, 0)])
    for _ in range(2):  # whether it is known by now or not
        with pytest.raises(tensorfork.TransportUnavailable, match="no 2"):
            mapped.enough(time.monotonic() + SOON)
    mapped.close(time.monotonic() + SOON)
