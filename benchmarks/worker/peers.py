"""What a user would do instead: read the files again, or call Mooncake's TransferEngine for every tensor."""

import os
import time
from typing import Any

import torch

from benchmarks.worker.state import Skip, State

NVLINK = "MC_INTRANODE_NVLINK"


def save(state: State, *, path: str) -> float:
    """Write the model to a safetensors file; its bytes."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise Skip(f"safetensors: {error}") from error
    # Arena tensors share a storage, which safetensors refuses to write; on the CPU each gets its own.
    save_file({name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}, path)
    return state.nbytes


def load(state: State, *, path: str) -> float:
    """Read it, from memory that holds it already, straight to the device."""
    from safetensors.torch import load_file

    state.sync()
    began = time.perf_counter()
    loaded = load_file(path, device=state.device)
    state.sync()
    spent = time.perf_counter() - began
    return sum(tensor.nbytes for tensor in loaded.values()) / spent / 1e9


def engine(state: State, *, nvlink: bool) -> dict[str, Any]:
    """Start an engine and register what the model lies in; where it is found, and where the tensors are."""
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise Skip(f"mooncake: {error}") from error
    before = os.environ.pop(NVLINK, None)
    if nvlink:
        os.environ[NVLINK] = "1"
    try:
        made = TransferEngine()
        code = made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    finally:
        os.environ.pop(NVLINK, None)
        if before is not None:
            os.environ[NVLINK] = before
    if code:
        raise Skip(f"mooncake: initialize returned {code}")
    stretches = _stretches(state)
    code = made.batch_register_memory([start for start, _ in stretches], [nbytes for _, nbytes in stretches])
    if code:
        raise Skip(f"mooncake: batch_register_memory returned {code}")
    state.kept["engine"] = made
    return {"port": made.get_rpc_port(), "tensors": [(t.data_ptr(), t.nbytes) for t in state.tensors.values()]}


def read(state: State, *, port: int, tensors: list[tuple[int, int]]) -> float:
    """One entry a tensor, in one batch, as SGLang's remote-instance loader does."""
    ours = [tensor.data_ptr() for tensor in state.tensors.values()]
    state.sync()
    began = time.perf_counter()
    code = state.kept["engine"].batch_transfer_sync_read(
        f"127.0.0.1:{port}", ours, [address for address, _ in tensors], [nbytes for _, nbytes in tensors]
    )
    spent = time.perf_counter() - began
    if code:
        raise RuntimeError(f"batch_transfer_sync_read returned {code}")
    return state.nbytes / spent / 1e9


def _stretches(state: State) -> list[tuple[int, int]]:
    """The allocator's segments that hold the model; on the CPU, the tensors."""
    starts = sorted(tensor.data_ptr() for tensor in state.tensors.values())
    if not state.on_gpu:
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in state.tensors.values()]
    index = torch.device(state.device).index
    segments = [
        (segment["address"], segment["total_size"])
        for segment in torch.cuda.memory.memory_snapshot()
        if segment["device"] == index
    ]
    return [(at, n) for at, n in segments if any(at <= start < at + n for start in starts)]
