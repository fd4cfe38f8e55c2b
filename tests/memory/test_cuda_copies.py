"""Copies name their direction; many are one call of the driver, in either version of that; the driver is a fake."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import fake_driver
import pytest

from tensorfork.memory import copy_batch, cuda

STREAM: Any = SimpleNamespace(cuda_stream=77, device=SimpleNamespace(index=1))
COPIES = [(1000, 5000, 10), (2000, 6000, 20), (3000, 7000, 30)]


class Driver:
    """Records what it is asked to copy."""

    def __init__(self, *, first: bool = False, second: bool = False) -> None:
        self.batches: list[list[tuple[int, int, int]]] = []
        self.single: list[tuple[int, int, int]] = []
        self.to_host: list[tuple[int, int, int]] = []
        self.to_device: list[tuple[int, int, int]] = []
        self.cuMemcpyDtoDAsync_v2 = partial(self._copy, self.single)
        self.cuMemcpyDtoHAsync_v2 = partial(self._copy, self.to_host)
        self.cuMemcpyHtoDAsync_v2 = partial(self._copy, self.to_device)
        self.gpu = fake_driver.Driver({1000: (4000, 1, True), 5000: (4000, 2, True)})
        self.cuPointerGetAttributes = self.gpu.cuPointerGetAttributes
        self.code = self.batch_code = 0
        if first:
            self.cuMemcpyBatchAsync = self._first
        if second:
            self.cuMemcpyBatchAsync_v2 = self._second

    def _copy(self, copies: list[tuple[int, int, int]], to: int, source: int, nbytes: int, stream: Any) -> int:
        assert stream.value == 77
        copies.append((to, source, nbytes))
        return self.code

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_OF_THE_TEST"
        return 0

    def _second(
        self, to: Any, sources: Any, sizes: Any, count: int, order: Any, which: Any, n: int, stream: int
    ) -> int:
        assert (stream, n, which._obj.value) == (77, 1, 0)  # one order, from the first copy on
        assert bytes(order._obj) == (1).to_bytes(4, "little") + bytes(20)  # CUmemcpyAttributes: in stream order
        self.batches.append(list(zip(to, sources, sizes, strict=True)))
        assert len(self.batches[-1]) == count
        return self.batch_code or self.code

    def _first(self, *arguments: Any) -> int:
        failed = arguments[-2]._obj
        assert ctypes.sizeof(failed) == ctypes.sizeof(ctypes.c_size_t)
        return self._second(*arguments[:-2], arguments[-1])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "current_context", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "relaxed_capture", nullcontext)
    copy_batch._batch_call.cache_clear()
    yield
    copy_batch._batch_call.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "driver_without_switching", lambda: driver)
    return driver


@pytest.mark.parametrize("versions", [{"first": True}, {"second": True}, {"first": True, "second": True}])
def test_many_copies_are_one_call(monkeypatch: pytest.MonkeyPatch, versions: dict[str, bool]) -> None:
    driver = use(monkeypatch, Driver(**versions))
    copy_batch.copy_batch(STREAM, COPIES)
    assert driver.batches == [COPIES]
    assert not driver.single


def test_a_driver_without_such_a_call_is_called_for_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver())
    copy_batch.copy_batch(STREAM, COPIES)
    assert driver.single == COPIES


def test_copies_of_no_bytes_are_left_out_and_a_single_copy_is_not_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = use(monkeypatch, Driver(second=True))
    copy_batch.copy_batch(STREAM, [(1, 2, 0), *COPIES, (3, 4, 0)])
    copy_batch.copy_batch(STREAM, [(1, 2, 0), COPIES[0]])
    copy_batch.copy_batch(STREAM, [(1, 2, 0)])
    copy_batch.copy_batch(STREAM, [])
    assert driver.batches == [COPIES]
    assert driver.single == [COPIES[0]]


@pytest.mark.parametrize("driver", [Driver(), Driver(second=True)])
def test_what_the_driver_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    use(monkeypatch, driver).code = 700
    with pytest.raises(cuda.DriverError, match=r"cuMemcpy.*CUDA_ERROR_OF_THE_TEST \(700\)"):
        copy_batch.copy_batch(STREAM, COPIES)


@pytest.mark.parametrize("code", [1, 801])
def test_what_the_call_for_many_refuses_is_copied_one_by_one(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    driver = use(monkeypatch, Driver(second=True))
    driver.batch_code = code
    copy_batch.copy_batch(STREAM, COPIES)
    assert driver.single == COPIES


def test_a_copy_tells_the_driver_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver())
    cuda.copy_to_host(STREAM, COPIES[:1])
    cuda.copy_to_device(STREAM, COPIES[1:2])
    cuda.copy_one_by_one(STREAM, COPIES[2:])
    assert (driver.to_host, driver.to_device, driver.single) == (COPIES[:1], COPIES[1:2], COPIES[2:])


@pytest.mark.parametrize("copy", [cuda.copy_to_host, cuda.copy_to_device, cuda.copy_one_by_one])
def test_an_address_that_the_driver_refuses_ends_the_copies_there(monkeypatch: pytest.MonkeyPatch, copy: Any) -> None:
    driver = use(monkeypatch, Driver())
    driver.code = 1
    with pytest.raises(cuda.DriverError, match=r"cuMemcpy[DH]to[DH]Async: CUDA_ERROR_OF_THE_TEST \(1\)"):
        copy(STREAM, COPIES)
    assert driver.to_host + driver.to_device + driver.single == COPIES[:1]


@pytest.mark.parametrize("gone", [1000, 5000])
def test_many_copies_are_not_given_to_the_driver_if_an_address_is_not_gpu_memory(
    monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    """The call for many would take it for host memory, and read or write it on the CPU."""
    driver = use(monkeypatch, Driver(second=True))
    del driver.gpu.memory[gone]
    with pytest.raises(cuda.DriverError, match="not memory that this process has on a GPU"):
        copy_batch.copy_batch(STREAM, COPIES)
    assert not driver.batches
    assert not driver.single


def test_whether_memory_is_mapped_is_one_question_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver(second=True))
    copy_batch.copy_batch(STREAM, COPIES)
    assert driver.gpu.queries == ["allocation"] * 2 * len(COPIES)
