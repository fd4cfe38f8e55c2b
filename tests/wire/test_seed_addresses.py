"""The address that a seed listens on, and the one that it gives to forks."""

import json
import socket
import subprocess
import sys

import pytest
import torch

import tensorfork

pytestmark = pytest.mark.slow


def model() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(1000.0)}


def test_a_seed_listens_on_loopback_unless_told_otherwise() -> None:
    with tensorfork.publish(model()) as seed:
        assert seed.address.startswith("tcp://127.0.0.1:")


def test_listening_on_every_interface_needs_an_address_to_advertise() -> None:
    for bind in ("tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*"):
        with pytest.raises(ValueError, match="advertise="):
            tensorfork.publish(model(), bind=bind)


@pytest.mark.parametrize("advertise", ["127.0.0.1", "localhost"])
def test_a_seed_on_every_interface_is_found_at_its_advertised_address(advertise: str) -> None:
    with tensorfork.publish(model(), bind="tcp://0.0.0.0:*", advertise=advertise) as seed:
        assert seed.address.startswith(f"tcp://{advertise}:")
        assert torch.equal(tensorfork.fork(seed.address, timeout=20)["a"], model()["a"])


def test_an_advertised_port_is_kept() -> None:
    with tensorfork.publish(model(), bind="tcp://0.0.0.0:*", advertise="tcp://gateway.example:4180") as seed:
        assert seed.address == "tcp://gateway.example:4180"


@pytest.mark.parametrize(
    ("advertise", "host"), [("10.0.0.7", "10.0.0.7"), ("::1", "[::1]"), ("[fe80::1]", "[fe80::1]"), ("gpu-7", "gpu-7")]
)
def test_an_advertised_host_gets_the_port_that_was_bound(advertise: str, host: str) -> None:
    with tensorfork.publish(model(), bind="tcp://0.0.0.0:*", advertise=advertise) as seed:
        found, _, port = seed.address.removeprefix("tcp://").rpartition(":")
        assert found == host
        assert int(port) > 1023


@pytest.mark.parametrize("advertise", ["0.0.0.0", "*", "tcp://[::]:4180", "", "a b", "host:x"])
def test_an_address_that_nobody_can_connect_to_cannot_be_advertised(advertise: str) -> None:
    with pytest.raises(ValueError, match="advertise="):
        tensorfork.publish(model(), bind="tcp://0.0.0.0:*", advertise=advertise)


def test_a_port_that_is_taken_is_an_os_error_that_names_it() -> None:
    with tensorfork.publish(model()) as seed, pytest.raises(OSError, match=seed.address):
        tensorfork.publish(model(), bind=seed.address)


def test_an_address_that_is_not_ours_is_an_os_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"tcp://203\.0\.113\.5:4180"):
        tensorfork.publish(model(), bind="tcp://203.0.113.5:4180")


def test_a_port_that_was_asked_for_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tensorfork.publish(model(), bind=f"tcp://127.0.0.1:{port}") as seed:
        assert seed.address == f"tcp://127.0.0.1:{port}"
        tensorfork.fork(seed.address, timeout=20)


def test_ipv6_works() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")
    with tensorfork.publish(model(), bind="tcp://[::1]:*") as seed:
        assert seed.address.startswith("tcp://[::1]:")
        assert torch.equal(tensorfork.fork(seed.address, timeout=20)["a"], model()["a"])
    with tensorfork.publish(model(), bind="tcp://[::]:*", advertise="::1") as seed:
        assert torch.equal(tensorfork.fork(seed.address, timeout=20)["a"], model()["a"])


def test_nothing_is_started_by_importing() -> None:
    """No thread, no change of the environment, no CUDA; and no package that is not needed."""
    program = """
import json, os, sys, threading
import torch
before, known = dict(os.environ), threading.active_count()
import tensorfork
threads, same = threading.active_count() - known, before == dict(os.environ)
print(json.dumps([threads, same, torch.cuda.is_initialized(), list(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, check=True, timeout=60)
    threads, same, initialised, modules = json.loads(done.stdout)
    assert threads == 0
    assert same
    assert not initialised
    optional = {"mooncake", "typer", "rich", "transformers", "safetensors", "etcd3gw", "vllm", "pytest", "hypothesis"}
    assert not optional & set(modules)
