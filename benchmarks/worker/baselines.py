"""What users would do without tensorfork: read files, or call Mooncake's TransferEngine with an entry a tensor."""

import os
import time
from typing import Any

import torch

from benchmarks.worker.state import Skip, WorkerState

NVLINK = "MC_INTRANODE_NVLINK"


def save_safetensors(state: WorkerState, *, path: str) -> float:
    """Write the model to a safetensors file; the model's bytes."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise Skip(f"safetensors: {error}") from error
    # safetensors refuses tensors that share a storage, as in an arena; their copies on the CPU do not.
    save_file({name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors.items()}, path)
    return state.nbytes


def load_safetensors(state: WorkerState, *, path: str) -> float:
    """Read the file straight to the device; GB/s."""
    from safetensors.torch import load_file

    state.sync()
    start = time.perf_counter()
    loaded = load_file(path, device=state.device)
    state.sync()
    seconds = time.perf_counter() - start
    return sum(tensor.nbytes for tensor in loaded.values()) / seconds / 1e9


def start_engine(state: WorkerState, *, nvlink: bool) -> dict[str, Any]:
    """Start an engine and register the memory of the model; the engine's port, and every tensor's address and bytes."""
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise Skip(f"mooncake: {error}") from error
    before = os.environ.pop(NVLINK, None)
    if nvlink:
        os.environ[NVLINK] = "1"
    try:
        engine = TransferEngine()
        code = engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    finally:
        os.environ.pop(NVLINK, None)
        if before is not None:
            os.environ[NVLINK] = before
    if code:
        raise Skip(f"mooncake: initialize returned {code}")
    ranges = _memory_ranges(state)
    code = engine.batch_register_memory([start for start, _ in ranges], [nbytes for _, nbytes in ranges])
    if code:
        raise Skip(f"mooncake: batch_register_memory returned {code}")
    state.resources["engine"] = engine
    return {"port": engine.get_rpc_port(), "tensors": [(t.data_ptr(), t.nbytes) for t in state.tensors.values()]}


def engine_read(state: WorkerState, *, port: int, tensors: list[tuple[int, int]]) -> float:
    """Read the other engine's tensors in one batch, an entry a tensor, as SGLang's loader does; GB/s."""
    addresses = [tensor.data_ptr() for tensor in state.tensors.values()]
    state.sync()
    start = time.perf_counter()
    code = state.resources["engine"].batch_transfer_sync_read(
        f"127.0.0.1:{port}", addresses, [address for address, _ in tensors], [nbytes for _, nbytes in tensors]
    )
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f"batch_transfer_sync_read returned {code}")
    return state.nbytes / seconds / 1e9


def _memory_ranges(state: WorkerState) -> list[tuple[int, int]]:
    """Addresses and bytes of the allocator's segments that hold the model; on a CPU, of the tensors."""
    starts = sorted(tensor.data_ptr() for tensor in state.tensors.values())
    if not state.on_gpu:
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in state.tensors.values()]
    index = torch.device(state.device).index
    segments = [
        (segment["address"], segment["total_size"])
        for segment in torch.cuda.memory.memory_snapshot()
        if segment["device"] == index
    ]
    return [(address, n) for address, n in segments if any(address <= start < address + n for start in starts)]
