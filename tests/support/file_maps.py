"""Models whose memory maps a file, and processes that publish and fill them: a mistake would end those."""

import mmap
import os
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import tensorfork

COUNT = 64 << 10
"""Elements of the tensor that is mapped: 256 KiB."""
SECONDS = 60.0


def written(path: Path) -> None:
    torch.from_file(str(path), shared=True, size=COUNT, dtype=torch.int32).copy_(torch.arange(COUNT))


def copy_on_write(path: Path) -> torch.Tensor:
    """As `torch.load(mmap=True)` and safetensors map files."""
    return torch.from_file(str(path), shared=False, size=COUNT, dtype=torch.int32)


def read_only(path: Path) -> torch.Tensor:
    """As numpy's ``mmap_mode="r"`` does."""
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return torch.frombuffer(mapped, dtype=torch.int32)


def model(mapped: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mapped tensor between two others."""
    return {"a": torch.ones(5), "mapped": mapped, "z": torch.ones(5)}


def serve_truncated(pipe: Connection, path: Path, transport: str) -> None:
    """Publish a model that maps a file. Then truncate that, rescan, or write the file anew, and send what is raised."""
    content = path.read_bytes()
    with tensorfork.publish(model(copy_on_write(path)), transports=[transport]) as seed:
        pipe.send(seed.address)
        while (request := pipe.recv()[0]) != "end":
            raised = None
            if request == "truncate":
                os.truncate(path, 4096)
            elif request == "heal":
                path.open("r+b").write(content)
            try:
                if request != "truncate":
                    seed.rescan()
            except tensorfork.UnsupportedTensor as error:
                raised = str(error)
            pipe.send(raised)


def publish_truncated(pipe: Connection, path: Path) -> None:
    """Try to publish a model whose file was truncated, as it is and as a snapshot, and send what is raised."""
    mapped = copy_on_write(path)
    os.truncate(path, 4096)
    for snapshot in (False, True):
        try:
            tensorfork.publish(model(mapped), snapshot=snapshot)
        except tensorfork.UnsupportedTensor as error:
            pipe.send(str(error))


def fill(pipe: Connection, kind: str, path: Path, address: str, transport: str) -> None:
    """Fork into a model that maps a file, in place, and send what is raised."""
    mapped = read_only(path) if kind == "read-only" else copy_on_write(path)
    if kind == "truncated":
        os.truncate(path, 4096)
    ours = model(mapped)
    ours["a"].zero_()
    try:
        tensorfork.fork_into(ours, address, transport=transport, timeout=SECONDS)
        pipe.send(mapped.tolist())
    except tensorfork.UnsupportedTensor as error:
        pipe.send((str(error), ours["a"].tolist()))
