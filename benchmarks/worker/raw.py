"""The limits: what this machine moves when nothing but moving is asked for. All in GB/s."""

import base64
import ctypes
import socket
import threading
import time
from typing import Any

import torch

from benchmarks.worker.state import Skip, State, view

BLOCK = 256 << 20


def memcpy(state: State, *, nbytes: int = BLOCK) -> float:
    """One core, from one buffer to another."""
    if "memcpy" not in state.kept:
        state.kept["memcpy"] = tuple(torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    into, source = state.kept["memcpy"]
    began = time.perf_counter()
    ctypes.memmove(into.data_ptr(), source.data_ptr(), nbytes)
    return nbytes / (time.perf_counter() - began) / 1e9


# One plain TCP connection, from the tensors of the one worker into those of another.


def tcp_serve(state: State) -> int:
    """Send all tensors, one after another, for every byte that is received; the port."""
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


def tcp_read(state: State, *, port: int, chunk: int) -> float:
    """Receive into our own tensors, at most `chunk` bytes a call."""
    if "tcp" not in state.kept:
        state.kept["tcp"] = socket.create_connection(("127.0.0.1", port))
    connection = state.kept["tcp"]
    views = [view(tensor) for tensor in state.tensors.values()]
    began = time.perf_counter()
    connection.sendall(b"g")
    for into in views:
        at, end = 0, len(into)
        while at < end:
            got = connection.recv_into(into[at : min(at + chunk, end)])
            if not got:
                raise ConnectionError("the other end hung up")
            at += got
    return state.nbytes / (time.perf_counter() - began) / 1e9


# GPUs. A worker's buffer is on its own device; the other one's, on the device it is read from.


def buffers(state: State, *, nbytes: int, source: str | None = None) -> None:
    """A buffer on our device and, for copies within one process, another on the source's."""
    state.kept["into"] = torch.ones(nbytes, dtype=torch.uint8, device=state.device)
    if source is not None:
        state.kept["from"] = torch.ones(nbytes, dtype=torch.uint8, device=source)
    state.sync()


def copy(state: State) -> float:
    """From the source's GPU to ours, within one process."""
    return _timed(state, state.kept["into"], state.kept["from"])


def ipc_offer(state: State) -> list[Any]:
    """Our buffer as a CUDA IPC handle: the values that torch.multiprocessing sends."""
    parts = state.kept["into"].untyped_storage()._share_cuda_()
    return [{"bytes": base64.b64encode(part).decode()} if isinstance(part, bytes) else part for part in parts]


def ipc_open(state: State, *, offer: list[Any]) -> None:
    """Another process's buffer becomes our source."""
    parts = [base64.b64decode(part["bytes"]) if isinstance(part, dict) else part for part in offer]
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    state.kept["ipc"] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def ipc_copy(state: State) -> float:
    """From the other process's buffer to ours."""
    return _timed(state, state.kept["into"], state.kept["ipc"])


def pinned(state: State, *, into_gpu: bool, nbytes: int = 1 << 30) -> float:
    """Between pinned host memory and our GPU."""
    if "pinned" not in state.kept:
        state.kept["pinned"] = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    host, device = state.kept["pinned"], state.kept["into"][:nbytes]
    host = host[: device.numel()]
    return _timed(state, device, host) if into_gpu else _timed(state, host, device)


def _timed(state: State, into: torch.Tensor, source: torch.Tensor) -> float:
    torch.cuda.synchronize(source.device) if source.is_cuda else None
    state.sync()
    began = time.perf_counter()
    into.copy_(source, non_blocking=True)
    torch.cuda.synchronize(source.device) if source.is_cuda else None
    state.sync()
    return into.nbytes / (time.perf_counter() - began) / 1e9


# NCCL: a group of two workers.


def nccl_join(state: State, *, names: list[str], port: int) -> float:
    """Form the group of these workers, the first operation included; seconds."""
    import torch.distributed as dist

    if not dist.is_nccl_available():
        raise Skip("this torch has no NCCL")
    torch.cuda.set_device(state.device)
    began = time.perf_counter()
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=names.index(state.name))
    nccl_meet(state)
    return time.perf_counter() - began


def nccl_meet(state: State) -> None:
    """Wait until the other one is here."""
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1, device=state.device))
    state.sync()


def nccl_send(state: State) -> float:
    """One message, from rank 0's buffer to rank 1's."""
    import torch.distributed as dist

    nccl_meet(state)
    buffer = state.kept["into"]
    began = time.perf_counter()
    dist.send(buffer, 1) if dist.get_rank() == 0 else dist.recv(buffer, 0)
    state.sync()
    return buffer.nbytes / (time.perf_counter() - began) / 1e9


def nccl_broadcast(state: State) -> float:
    """Every tensor of the model by itself, as engines do that update weights through a group."""
    import torch.distributed as dist

    nccl_meet(state)
    began = time.perf_counter()
    for tensor in state.tensors.values():
        dist.broadcast(tensor.detach(), 0)
    state.sync()
    return state.nbytes / (time.perf_counter() - began) / 1e9
