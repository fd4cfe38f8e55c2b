"""A seed and a fork in processes of their own, whose GPU memory can be taken away from under their tensors."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

import torch
from vmm import DriverMemory, VirtualMemory

import tensorfork
from tensorfork.memory.staging import HostAccess
from tensorfork.transports.cuda_ipc import CudaIpc
from tensorfork.transports.process_group import NCCL
from tensorfork.transports.transfer_engine import TransferEngine
from tensorfork.transports.zeromq import ZeroMQ

MIB = 1 << 20
PIECE, PIECES = 16 * MIB, 3

TRANSPORTS: dict[str, Callable[[float | None], tensorfork.Transport]] = {
    "cuda_ipc": lambda rate: CudaIpc(rate_limit=rate),
    "nccl": lambda rate: NCCL(),
    "transfer_engine:nvlink": lambda rate: TransferEngine(fabric="nvlink", rate_limit=rate),
    "transfer_engine:tcp": lambda rate: TransferEngine(fabric="tcp", rate_limit=rate, keep_registered=True),
    "zeromq": lambda rate: ZeroMQ(),
}
KINDS = {"virtual": VirtualMemory, "malloc": DriverMemory}

Memory = VirtualMemory | DriverMemory


def tensors_in(memory: Memory) -> dict[str, torch.Tensor]:
    """One tensor within a piece, and, of virtual memory, one that lies in two."""
    if isinstance(memory, DriverMemory):
        return {str(i): memory.tensor(i, PIECE) for i in range(PIECES)}
    return {"0": memory.tensor(4096, PIECE - 8192), "1": memory.tensor(PIECE, 2 * PIECE)}


def pattern(index: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """What the tensor of this index should hold: uint8 [nbytes]."""
    return (torch.arange(nbytes, dtype=torch.int32, device=device) * 31 + (index + 1) * 7).to(torch.uint8)


def fill(tensors: dict[str, torch.Tensor]) -> None:
    for i, tensor in enumerate(tensors.values()):
        tensor.copy_(pattern(i, tensor.numel(), tensor.device))
        torch.cuda.synchronize(tensor.device)


def answer(pipe: Connection, commands: dict[str, Callable[..., Any]]) -> None:
    """Answer ("name", arguments) with ("done", result) or ("raised", name of the error, its text), until the end."""
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = "done", commands[name](*arguments)
        except Exception as error:
            result = "raised", type(error).__name__, str(error)  # type: ignore[assignment]
        pipe.send(result)


def alive(device: int) -> int:
    """Whether CUDA still works in this process: 1000."""
    return int(torch.ones(1000, device=f"cuda:{device}").sum().item())


class SeedProcess:
    """Publishes tensors in memory of one kind on cuda:0, and does to it what it is told."""

    def __init__(self, memory: Memory, transport: str) -> None:
        self.memory, self.tensors = memory, tensors_in(memory)
        fill(self.tensors)
        self.seed = tensorfork.publish(self.tensors, transports=[TRANSPORTS[transport](None)])

    def commands(self) -> dict[str, Callable[..., Any]]:
        return {
            "address": lambda: self.seed.address,
            "alive": lambda: alive(0),
            "unmap": self.memory.unmap,
            "map": self.map,
            "rescan": self.seed.rescan,
            "suspend": self.suspend,
            "resume": self.seed.resume,
            "running": lambda: self.seed.stats().running,
            "unmap at read": self.unmap_at_read,
            "replace": self.replace,
            "allocated": lambda: torch.cuda.memory_allocated(0),
            "free": lambda: torch.cuda.mem_get_info(0)[0],
        }

    def map(self) -> None:
        """Map new memory, and fill it. Where it is not at the same addresses, the tensors are made anew."""
        if not self.memory.map():
            self.tensors.update(tensors_in(self.memory))
        fill(self.tensors)

    def suspend(self, timeout: float) -> float:
        begun = time.monotonic()
        self.seed.suspend(timeout)
        return time.monotonic() - begun

    def unmap_at_read(self, number: int) -> None:
        """Unmap the memory before the n-th time that a range of it is read over ZeroMQ, when no copy is in flight."""
        read, left = HostAccess.read, [number]

        def read_unmapped(memory: HostAccess, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                self.memory.unmap()
            return read(memory, *arguments)

        HostAccess.read = read_unmapped  # type: ignore[method-assign]

    def replace(self) -> float:
        """Replace all tensors by new ones of torch's, under `updating`. Seconds until only these are allocated."""
        nbytes = torch.cuda.memory_allocated(0)
        begun = time.monotonic()
        with self.seed.updating():
            for name, tensor in list(self.tensors.items()):
                self.tensors[name] = torch.empty(tensor.numel(), dtype=torch.uint8, device="cuda:0")
                del tensor
            fill(self.tensors)
        while torch.cuda.memory_allocated(0) > nbytes + 4 * MIB:
            if time.monotonic() - begun > 20:
                raise TimeoutError("both models are still allocated")
            time.sleep(0.005)
        return time.monotonic() - begun


def seed_process(pipe: Connection, kind: str, transport: str) -> None:
    """The seed's process. Of kind "torch", its memory is torch's, which it can only `replace`."""
    with ExitStack() as stack:
        if kind == "torch":
            torch.cuda.init()
            seed = SeedProcess.__new__(SeedProcess)
            seed.tensors = {str(i): torch.empty(32 * MIB, dtype=torch.uint8, device="cuda:0") for i in range(3)}
            seed.memory = DriverMemory(0, 4096)
            fill(seed.tensors)
            seed.seed = tensorfork.publish(seed.tensors, transports=[TRANSPORTS[transport](None)])
        else:
            seed = SeedProcess(stack.enter_context(KINDS[kind](0, PIECE, PIECES)), transport)
        stack.enter_context(seed.seed)
        pipe.send(None)
        answer(pipe, seed.commands())


def fork_process(pipe: Connection, device: int, kind: str) -> None:
    """The fork's process: forks at request into virtual memory. `kind` is that of the seed's memory."""
    with VirtualMemory(device, 2 * PIECE if kind == "torch" else PIECE, PIECES) as memory:
        piece = memory.piece
        ours = {str(i): memory.tensor(i * piece, piece) for i in range(PIECES)}
        if kind == "virtual":
            ours = tensors_in(memory)

        def fork(address: str, transport: str, rate: float | None, then: str, options: dict[str, Any]) -> bool:
            """Fork, and do something once the first bytes have arrived: say "begun", and perhaps wait for a word; or
            unmap our own memory.
            """
            begun = Event()

            def progress(arrived: int, total: int) -> None:
                if begun.is_set() or not arrived:
                    return
                begun.set()
                if then == "unmap":
                    torch.cuda.synchronize(device)  # so that no copy is in flight
                    memory.unmap()
                if then in ("say", "wait"):
                    pipe.send("begun")
                if then == "wait":
                    assert pipe.recv() == ("go on",)

            for tensor in ours.values() if options.pop("clear", True) else ():
                tensor.zero_()
            torch.cuda.synchronize(device)
            made = TRANSPORTS[transport](rate)
            tensorfork.fork_into(ours, address, transport=made, timeout=40.0, progress=progress, **options)
            return all(torch.equal(one, pattern(i, one.numel(), one.device)) for i, one in enumerate(ours.values()))

        commands = {"fork": fork, "unmap": memory.unmap, "map": memory.map, "alive": lambda: alive(device)}
        pipe.send(None)
        answer(pipe, commands)
