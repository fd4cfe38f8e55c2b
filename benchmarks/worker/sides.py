"""The seed and the fork, through the public names alone."""

import inspect
import threading
import time
from typing import Any

import torch

import tensorfork
from benchmarks.worker.state import Skip, State
from tensorfork.transports import registry

LIBRARIES = {"transfer_engine": "mooncake.engine"}
"""What a transport imports when it is used; part of "imports done"."""


def warm_up(state: State, *, transport: str | None = None) -> None:
    """What a cold fork finds done: imports, and a CUDA context. Raises `Skip` for an option that does not exist."""
    if transport is not None:
        _transport(state, transport)
    name = (transport or "").partition(",")[0].partition(":")[0]
    if name:
        try:
            registry.load(name)
            if name in LIBRARIES:
                __import__(LIBRARIES[name])
        except (tensorfork.TensorForkError, ImportError):
            pass  # asking for it says why
    if state.on_gpu:
        torch.cuda.set_device(state.device)
        torch.empty(1, device=state.device).fill_(1)
        state.sync()


def publish(state: State, *, transports: list[str] | None = None) -> dict[str, Any]:
    """Publish the model; again, if it was published."""
    if state.seed is not None:
        state.seed.close()
        state.seed = None
    offered = None if transports is None else [_transport(state, word) for word in transports]
    state.sync()
    began, used = time.perf_counter(), time.process_time()
    try:
        state.seed = tensorfork.publish(state.model, transports=offered)
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    spent, used = time.perf_counter() - began, time.process_time() - used
    return {"seconds": spent, "processor": used, "address": state.seed.address}


def fork(state: State, *, address: str, transport: str, verify: bool, timeout: float = 120.0) -> dict[str, Any]:
    """Fork into the worker's model; every phase of the report, and the whole as the caller waited for it."""
    chosen = _transport(state, transport)
    state.sync()
    moment, began = time.monotonic(), time.perf_counter()
    try:
        report = tensorfork.fork_into(
            state.model, address, device=state.device, transport=chosen, timeout=timeout, verify=verify
        )
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    state.sync()
    whole = time.perf_counter() - began
    return {
        "whole": whole,
        "began": moment,
        "seconds": dict(report.seconds),
        "nbytes": report.nbytes,
        "gbps": report.gbps,
        "transport": report.transport,
        "fabric": report.fabric,
        "verified": report.verified,
    }


def settle(state: State, *, seconds: float = 10.0) -> None:
    """Wait, for so long at most, until the seed is done with the forks it had: of our threads, only one listens."""
    patience = time.monotonic() + seconds
    while time.monotonic() < patience:
        if [one.name for one in threading.enumerate() if one.name.startswith("tensorfork")] == ["tensorfork-seed"]:
            return
        time.sleep(0.005)


def take(state: State, *, address: str, transport: str, timeout: float = 120.0) -> dict[str, Any]:
    """Fork everything the seed has into new memory, which becomes the worker's model."""
    try:
        state.tensors = tensorfork.fork(
            address, device=state.device, transport=_transport(state, transport), timeout=timeout
        )
    except tensorfork.TransportUnavailable as error:
        raise Skip(str(error)) from error
    state.model = state.tensors
    return {"tensors": len(state.tensors), "nbytes": state.nbytes}


def forks(state: State, *, address: str, transport: str, verify: bool, seconds: float) -> dict[str, Any]:
    """Fork without pause for so long; the speed that was kept up, pauses between transfers included, the speed of each
    transfer, and from when to when it was (`time.monotonic`).
    """
    chosen = _transport(state, transport)
    began = time.perf_counter()
    count = nbytes = 0
    speeds, moments = [], list[float]()

    def mark(done: int, total: int) -> None:
        if done in (0, total):
            moments.append(time.monotonic())

    while (spent := time.perf_counter() - began) < seconds:
        report = tensorfork.fork_into(
            state.model, address, device=state.device, transport=chosen, verify=verify, progress=mark
        )
        count, nbytes = count + 1, nbytes + report.nbytes
        speeds.append(report.gbps)
    windows = list(zip(moments[::2], moments[1::2], strict=True))
    return {"forks": count, "seconds": spent, "gbps": nbytes / spent / 1e9, "transfers": speeds, "windows": windows}


def _transport(state: State, word: str) -> Any:
    """The transport a word stands for: the same one every time.

    A word is a name, perhaps with a fabric and options: ``nccl``, ``transfer_engine:tcp``, ``nccl,max_ctas=2``.
    """
    made = state.kept.setdefault("transports", {})
    if word not in made:
        made[word] = _make(word)
    return made[word]


def _make(word: str) -> Any:
    head, *rest = word.split(",")
    if not rest:
        return word
    name, _, fabric = head.partition(":")
    options = {key: _value(value) for key, _, value in (one.partition("=") for one in rest)}
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


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
