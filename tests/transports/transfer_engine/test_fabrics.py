"""Which fabric two sides choose, the reasons against each, and the settings that are refused."""

from collections.abc import Sequence
from typing import Any

import pytest

import tensorfork
from tensorfork import TransportUnavailable
from tensorfork.interpreter import process
from tensorfork.transports import registry
from tensorfork.transports.transfer_engine import TransferEngine, fabrics

GPU = {"devices": ["cuda:0"], "cuda": True}
CPU = {"devices": ["cpu"], "cuda": False}


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "wheel": "mooncake 1",
        "cuda": True,
        "fabrics": ["nvlink", "rdma", "tcp"],
        "host": "here",
        "process": b"one",
        "devices": ["cuda:0"],
        "nics": ["mlx5_0"],
        "closed": None,
    } | changes


@pytest.mark.parametrize(
    ("fork", "seed", "fabric"),
    [
        ({}, {"process": b"other"}, "nvlink"),
        ({}, {"host": "there"}, "rdma"),
        ({}, {"host": None}, "rdma"),
        ({}, {"process": b"other", "closed": "expandable"}, "rdma"),
        ({}, {}, "rdma"),
        ({}, {"host": "there", "nics": []}, "tcp"),
        (CPU, CPU, "rdma"),
        ({"nics": []}, {"devices": ["cpu", "cuda:0"]}, "tcp"),
        ({"fabrics": ["tcp", "nvlink"]}, {}, "tcp"),
        ({"fabrics": ["rdma"]}, {}, "rdma"),
    ],
)
def test_the_first_fabric_that_both_can_use_is_chosen(fork: Any, seed: Any, fabric: str) -> None:
    assert fabrics.choose(facts(**fork), facts(**seed)) == fabric


@pytest.mark.parametrize(
    ("fork", "seed", "why_not"),
    [
        ({"fabrics": ["rdma"], "nics": []}, {}, "rdma: the fork has no RDMA NIC"),
        ({"fabrics": ["rdma"]}, {"nics": []}, "rdma: the seed has no RDMA NIC"),
        ({"fabrics": ["rdma"]}, {"cuda": False}, "rdma: the seed's tensors are on cuda:0"),
        ({"fabrics": ["nvlink"]}, {"host": "there"}, "nvlink: the two are not on one host"),
        ({"fabrics": ["nvlink"], "host": None}, {"host": None}, "nvlink: the two are not on one host"),
        ({"fabrics": ["nvlink"]}, {"devices": ["cpu", "cuda:0"]}, "some of the seed's is on the CPU; cuda_ipc takes"),
        ({"fabrics": ["nvlink"]}, {"process": b"other", "closed": "it is expandable"}, "nvlink: it is expandable"),
        ({"fabrics": ["nvlink"]}, {}, "nvlink: both are one process"),
        ({"fabrics": ["nvlink"], "cuda": False}, {}, "nvlink: the fork's mooncake 1 was built without CUDA"),
        ({"fabrics": ["tcp"]}, {"fabrics": ["rdma"]}, r"transports=\['transfer_engine:tcp'\]"),
        ({"fabrics": ["nvlink", "rdma"], "nics": []}, {"host": "there"}, "nvlink: .*; rdma: "),
        ({}, {"fabrics": []}, "the seed does not offer it"),
    ],
)
def test_the_error_names_the_reason_against_each_fabric(fork: Any, seed: Any, why_not: str) -> None:
    with pytest.raises(TransportUnavailable, match=why_not):
        fabrics.choose(facts(**fork), facts(**seed))
    assert TransferEngine().why_not(facts(**fork), facts(**seed)) is not None


def test_tcp_is_offered_only_by_a_seed_that_names_it() -> None:
    by_default = TransferEngine()
    assert by_default.why_not(facts(fabrics=["tcp"]), facts(fabrics=list(_fabrics(by_default)))) is not None
    named = registry.load("transfer_engine:tcp")
    assert named.why_not(facts(fabrics=["tcp"]), facts(fabrics=list(_fabrics(named)))) is None


def _fabrics(transport: tensorfork.Transport) -> Sequence[str]:
    assert isinstance(transport, TransferEngine)
    return transport._fabrics


def test_the_host_is_the_same_for_two_processes_on_one_network() -> None:
    assert process.host_and_network_id() == process.host_and_network_id()
    assert process.host_and_network_id() is not None


@pytest.mark.parametrize("name", ["transfer_engine:carrier", "zeromq:tcp", "cuda_ipc:nvlink"])
def test_a_fabric_that_a_transport_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(TransportUnavailable, match=name.partition(":")[2]):
        registry.load(name)


@pytest.mark.parametrize("wrong", [{"fabric": "carrier"}, {"rate_limit": 0}, {"piece": 1000}])
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fabric|rate_limit|piece"):
        TransferEngine(**wrong)
    with pytest.raises(TypeError, match="nics"):
        TransferEngine(nics="mlx5_0")
