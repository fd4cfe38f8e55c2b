"""Models whose memory maps files that are truncated, or cannot be written: no process ends, and errors name the file.

Each runs in a process of its own: a load or a store beyond the end of a file ends it.
"""

import re
from pathlib import Path

import pytest
import torch
from file_maps import COUNT, SECONDS, fill, model, publish_truncated, serve_truncated, written
from processes import Child
from seed_leases import under_way

import tensorfork
from tensorfork.transports import registry

pytestmark = pytest.mark.slow

TRANSPORTS = ["zeromq", "gloo", "transfer_engine:tcp"]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    try:
        registry.load(request.param).facts([])
    except tensorfork.TransportUnavailable as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written(tmp_path / "weights")
    return tmp_path / "weights"


def splitting(name: str) -> tensorfork.Transport:
    """A transport, with pieces so small that there are many copies of one tensor."""
    transport = registry.load(name)
    transport.piece = 16 << 10
    return transport


def empty() -> dict[str, torch.Tensor]:
    return model(torch.zeros(COUNT, dtype=torch.int32))


@pytest.mark.parametrize("verify", [True, False])
def test_a_seed_whose_file_is_truncated_refuses_by_its_name_and_lives(path: Path, transport: str, verify: bool) -> None:
    with Child(serve_truncated, path, transport) as child:
        address = child.recv()
        child.request("truncate")
        with pytest.raises(tensorfork.SeedMoved, match="maps the file weights, which was truncated") as raised:
            tensorfork.fork_into(empty(), address, transport=transport, timeout=SECONDS, verify=verify)
        assert raised.value.tensors == ("mapped",)
        assert str(path.parent) not in str(raised.value)
        assert f"mapped: its memory maps the file {path}, which was truncated" in child.request("rescan")
        assert child.request("heal") is None
        ours = empty()
        tensorfork.fork_into(ours, address, transport=transport, timeout=SECONDS, verify=verify)
        assert ours["mapped"].tolist() == list(range(COUNT))


def test_a_model_whose_file_was_truncated_is_not_published(path: Path) -> None:
    with Child(publish_truncated, path) as child:
        for _ in range(2):
            assert f"mapped: its memory maps the file {path}, which was truncated" in child.recv()


@pytest.mark.parametrize(
    ("kind", "reason"), [("truncated", "maps the file .*weights, which was truncated"), ("read-only", "is read-only")]
)
def test_a_model_that_cannot_be_written_is_refused_before_anything_happens(path: Path, kind: str, reason: str) -> None:
    with Child(fill, kind, path, "tcp://127.0.0.1:1", "zeromq") as child:  # nobody listens there
        message, a = child.recv()
    assert re.search(f"^mapped: its memory {reason}", message)
    assert a == [0.0] * 5


def test_a_model_that_maps_a_file_copy_on_write_is_filled_and_the_file_is_not(path: Path, transport: str) -> None:
    before, source = path.read_bytes(), model(torch.arange(COUNT, dtype=torch.int32).flip(0))
    with (
        tensorfork.publish(source, transports=[transport]) as seed,
        Child(fill, "copy-on-write", path, seed.address, transport) as child,
    ):
        assert child.recv() == source["mapped"].tolist()
    assert path.read_bytes() == before


def test_memory_that_is_truncated_under_way_is_an_error_and_the_seed_lives(path: Path, transport: str) -> None:
    with Child(serve_truncated, path, transport) as child:
        address = child.recv()
        moving = under_way(lambda: child.request("truncate"), splitting(transport))
        with pytest.raises(tensorfork.TensorForkError):
            tensorfork.fork_into(empty(), address, transport=moving, timeout=SECONDS)
        assert child.request("heal") is None
        tensorfork.fork_into(empty(), address, transport=transport, timeout=SECONDS)
