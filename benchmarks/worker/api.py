"""What seeds and forks do, through tensorfork's public functions alone.

A transport is described by its name, perhaps with a fabric and with options: ``nccl``, ``transfer_engine:tcp``,
``nccl,max_ctas=2``.
"""

import inspect
import threading
import time
from typing import Any

import torch

import tensorfork
from benchmarks.worker.state import Skip, WorkerState
from tensorfork.interpreter.settings import process_settings_allowed
from tensorfork.transports import registry

LIBRARIES = {"transfer_engine": "mooncake.engine"}
"""What a transport imports when it is first used; a cold fork finds it imported."""


def warm_up(state: WorkerState, *, transport: str | None = None) -> None:
    """Do the imports and make the CUDA context that a cold fork finds. Raises `Skip` for an option that is unknown."""
    if transport is not None:
        _transport(state, transport)
    name = (transport or "").partition(",")[0].partition(":")[0]
    if name:
        try:
            registry.load(name)
            if name in LIBRARIES:
                __import__(LIBRARIES[name])
        except (tensorfork.TensorForkError, ImportError):
            pass  # publishing and forking report the reason
    if state.on_gpu:
        torch.cuda.set_device(state.device)
        torch.empty(1, device=state.device).fill_(1)
        state.sync()


def settings_allowed(state: WorkerState) -> bool:
    """Whether tensorfork may change settings of the worker's process."""
    return process_settings_allowed()


def publish(
    state: WorkerState,
    *,
    transports: list[str] | None = None,
    stable: bool = False,
    rate_limit: float | None = None,
    stall: float = 15.0,
) -> dict[str, Any]:
    """Publish the model, after closing the seed if it is published already."""
    if state.seed is not None:
        state.seed.close()
        state.seed = None
    offered = None if transports is None else [_transport(state, description) for description in transports]
    state.sync()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        state.seed = tensorfork.publish(
            state.model, transports=offered, stable=stable, rate_limit=rate_limit, stall=stall
        )
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "address": state.seed.address}


def fork(state: WorkerState, *, address: str, transport: str, verify: bool, timeout: float = 120.0) -> dict[str, Any]:
    """Fork into the worker's model: the report, with the seconds of each phase and of the whole call.

    `start` is when the call began, by `time.monotonic`.
    """
    chosen = _transport(state, transport)
    state.sync()
    start, precise_start = time.monotonic(), time.perf_counter()
    try:
        report = tensorfork.fork_into(
            state.model, address, device=state.device, transport=chosen, timeout=timeout, verify=verify
        )
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    state.sync()
    whole = time.perf_counter() - precise_start
    return {
        "whole": whole,
        "start": start,
        "seconds": dict(report.seconds),
        "nbytes": report.nbytes,
        "gbps": report.gbps,
        "transport": report.transport,
        "fabric": report.fabric,
        "verified": report.verified,
    }


def wait_until_idle(state: WorkerState, *, timeout: float = 10.0) -> None:
    """Wait, for `timeout` at most, until the seed has finished its forks: then it has one thread, which listens."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if sum(thread.name.startswith("tensorfork") for thread in threading.enumerate()) <= 1:
            return
        time.sleep(0.005)


def fork_new(state: WorkerState, *, address: str, transport: str, timeout: float = 120.0) -> dict[str, Any]:
    """Fork everything that the seed has into new memory, which becomes the worker's model."""
    try:
        state.tensors = tensorfork.fork(
            address, device=state.device, transport=_transport(state, transport), timeout=timeout
        )
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    state.model = state.tensors
    return {"tensors": len(state.tensors), "nbytes": state.nbytes}


def fork_repeatedly(
    state: WorkerState, *, address: str, transport: str, verify: bool, seconds: float
) -> dict[str, Any]:
    """Fork again and again for so many seconds.

    Returns the number of forks, the GB/s over all of the time, the GB/s of each transfer, and each transfer's window:
    when it began and ended (`time.monotonic`).
    """
    chosen = _transport(state, transport)
    start = time.perf_counter()
    count = nbytes = 0
    speeds, moments = [], list[float]()

    def progress(done: int, total: int) -> None:
        if done in (0, total):
            moments.append(time.monotonic())

    while (elapsed := time.perf_counter() - start) < seconds:
        report = tensorfork.fork_into(
            state.model, address, device=state.device, transport=chosen, verify=verify, progress=progress
        )
        count, nbytes = count + 1, nbytes + report.nbytes
        speeds.append(report.gbps)
    windows = list(zip(moments[::2], moments[1::2], strict=True))
    return {"forks": count, "seconds": elapsed, "gbps": nbytes / elapsed / 1e9, "transfers": speeds, "windows": windows}


def _transport(state: WorkerState, description: str) -> Any:
    """The transport that is described; the same object every time."""
    transports = state.resources.setdefault("transports", {})
    if description not in transports:
        transports[description] = _construct(description)
    return transports[description]


def _construct(description: str) -> Any:
    head, *settings = description.split(",")
    if not settings:
        return description
    name, _, fabric = head.partition(":")
    options = {key: _number(value) for key, _, value in (setting.partition("=") for setting in settings)}
    if fabric:
        options["fabric"] = fabric
    try:
        kind = type(registry.load(name))
    except tensorfork.TensorForkError as error:
        raise Skip(str(error)) from error
    known = inspect.signature(kind).parameters
    if unknown := [option for option in options if option not in known]:
        raise Skip(f"the transport {name} has no option {', '.join(unknown)}")
    try:
        return kind(**options)
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error


def _number(text: str) -> Any:
    """An int or a float where the text is one, and otherwise the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
