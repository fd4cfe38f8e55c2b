"""The limits of this machine: the speed of plain copies, sockets and collectives. All in GB/s."""

import base64
import ctypes
import socket
import threading
import time
from typing import Any

import torch

from benchmarks.worker.state import Skip, WorkerState, view

MEMCPY_BYTES = 256 << 20


def memcpy(state: WorkerState, *, nbytes: int = MEMCPY_BYTES) -> float:
    """Copy from one buffer to another, with one core."""
    if "memcpy" not in state.resources:
        state.resources["memcpy"] = tuple(torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    target, source = state.resources["memcpy"]
    start = time.perf_counter()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
    return nbytes / (time.perf_counter() - start) / 1e9


# One plain TCP connection, from the tensors of one worker into those of another.


def tcp_serve(state: WorkerState) -> int:
    """Start a server that sends all tensors for every byte that it receives; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection = listener.accept()[0]
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1):
                for tensor in state.tensors.values():
                    connection.sendall(view(tensor))

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def tcp_read(state: WorkerState, *, port: int, chunk: int) -> float:
    """Receive all tensors into this worker's, at most `chunk` bytes a call."""
    if "tcp" not in state.resources:
        state.resources["tcp"] = socket.create_connection(("127.0.0.1", port))
    connection = state.resources["tcp"]
    views = [view(tensor) for tensor in state.tensors.values()]
    start = time.perf_counter()
    connection.sendall(b"g")
    for target in views:
        at, end = 0, len(target)
        while at < end:
            received = connection.recv_into(target[at : min(at + chunk, end)])
            if not received:
                raise ConnectionError("the other end closed the connection")
            at += received
    return state.nbytes / (time.perf_counter() - start) / 1e9


# GPUs. "target" is a buffer on the worker's own device, "source" one on the device that is read from.


def buffers(state: WorkerState, *, nbytes: int, source: str | None = None) -> None:
    """Make a buffer on the worker's device and, for copies within one process, another on the device `source`."""
    state.resources["target"] = torch.ones(nbytes, dtype=torch.uint8, device=state.device)
    if source is not None:
        state.resources["source"] = torch.ones(nbytes, dtype=torch.uint8, device=source)
    state.sync()


def copy(state: WorkerState) -> float:
    """Copy from the source's GPU to the worker's, within one process."""
    return _timed_copy(state, state.resources["target"], state.resources["source"])


def ipc_offer(state: WorkerState) -> list[Any]:
    """The worker's buffer as a CUDA IPC handle: the values that torch.multiprocessing sends."""
    parts = state.resources["target"].untyped_storage()._share_cuda_()
    return [{"bytes": base64.b64encode(part).decode()} if isinstance(part, bytes) else part for part in parts]


def ipc_open(state: WorkerState, *, offer: list[Any]) -> None:
    """Open another process's buffer."""
    parts = [base64.b64decode(part["bytes"]) if isinstance(part, dict) else part for part in offer]
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    state.resources["ipc source"] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def ipc_copy(state: WorkerState) -> float:
    """Copy from the other process's buffer to the worker's."""
    return _timed_copy(state, state.resources["target"], state.resources["ipc source"])


def pinned(state: WorkerState, *, into_gpu: bool, nbytes: int = 1 << 30) -> float:
    """Copy between pinned host memory and the worker's GPU."""
    if "pinned" not in state.resources:
        state.resources["pinned"] = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    host, device = state.resources["pinned"], state.resources["target"][:nbytes]
    host = host[: device.numel()]
    return _timed_copy(state, device, host) if into_gpu else _timed_copy(state, host, device)


def _timed_copy(state: WorkerState, target: torch.Tensor, source: torch.Tensor) -> float:
    torch.cuda.synchronize(source.device) if source.is_cuda else None
    state.sync()
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(source.device) if source.is_cuda else None
    state.sync()
    return target.nbytes / (time.perf_counter() - start) / 1e9


# NCCL: a group of two workers.


def nccl_join(state: WorkerState, *, names: list[str], port: int) -> float:
    """Make the group of these workers and run its first operation; the seconds."""
    import torch.distributed as dist

    if not dist.is_nccl_available():
        raise Skip("this torch has no NCCL")
    torch.cuda.set_device(state.device)
    start = time.perf_counter()
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=names.index(state.name))
    nccl_barrier(state)
    return time.perf_counter() - start


def nccl_barrier(state: WorkerState) -> None:
    """Wait until the other worker calls this too."""
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1, device=state.device))
    state.sync()


def nccl_send(state: WorkerState) -> float:
    """Send one message, from rank 0's buffer to rank 1's."""
    import torch.distributed as dist

    nccl_barrier(state)
    buffer = state.resources["target"]
    start = time.perf_counter()
    dist.send(buffer, 1) if dist.get_rank() == 0 else dist.recv(buffer, 0)
    state.sync()
    return buffer.nbytes / (time.perf_counter() - start) / 1e9


def nccl_broadcast(state: WorkerState) -> float:
    """Broadcast every tensor of the model by itself, as engines do that update weights through a group."""
    import torch.distributed as dist

    nccl_barrier(state)
    start = time.perf_counter()
    for tensor in state.tensors.values():
        dist.broadcast(tensor.detach(), 0)
    state.sync()
    return state.nbytes / (time.perf_counter() - start) / 1e9
