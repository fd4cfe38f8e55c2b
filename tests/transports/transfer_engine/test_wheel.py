"""The errors for a wheel that is missing, doubled, or cannot be imported; and the environment afterwards."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

from tensorfork import TransportUnavailable
from tensorfork.interpreter import environment
from tensorfork.transports.transfer_engine import TransferEngine, library
from tensorfork.transports.transfer_engine.engine import explain


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_installed(**wheels: str) -> None:
        def version(name: str) -> str:
            try:
                return wheels[name.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(library, "_imported_wheel", {})
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    return set_installed


@pytest.mark.parametrize(
    ("cuda", "extra"), [(None, "transfer-engine-cpu"), ("12.8", "transfer-engine"), ("13.0", "transfer-engine-cuda13")]
)
def test_a_missing_wheel_is_named_by_the_extra_that_fits_torch(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cuda: str | None, extra: str
) -> None:
    installed()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(TransportUnavailable, match=rf"pip install 'tensorfork\[{extra}\]'"):
        TransferEngine().facts([])


def test_two_wheels_at_once_are_refused_with_the_command_that_removes_one(installed: Callable[..., None]) -> None:
    installed(mooncake_transfer_engine="0.3.13", mooncake_transfer_engine_non_cuda="0.3.13")
    both = "pip uninstall -y mooncake-transfer-engine mooncake-transfer-engine-non-cuda && pip install "
    with pytest.raises(TransportUnavailable, match=both):
        TransferEngine().facts([])


def test_the_wheel_s_name_tells_whether_it_was_built_with_cuda(installed: Callable[..., None]) -> None:
    installed(mooncake_transfer_engine_cuda13="0.3.14")
    assert library.installed_wheel().cuda
    installed(mooncake_transfer_engine_non_cuda="0.3.13")
    assert not library.installed_wheel().cuda


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("libibverbs.so.1", "apt-get install -y libibverbs1 "),
        ("libmlx5.so.1", "apt-get install -y ibverbs-providers "),
        ("libnuma.so.1", "apt-get install -y libnuma1 "),
        ("libcuda.so.1", r"pip install 'tensorfork\[transfer-engine-cpu\]'"),
        ("libcudart.so.12", r"pip install 'tensorfork\[transfer-engine-cuda13\]'"),
        ("libcudart.so.13", r"pip install 'tensorfork\[transfer-engine\]'"),
        ("libother.so.1", "pip install --force-reinstall"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, missing: str, command: str
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{missing}: cannot open shared object file: No such file or directory")

    monkeypatch.delitem(library.sys.modules, "mooncake.engine", raising=False)
    monkeypatch.setattr(library.importlib, "import_module", fail)
    with pytest.raises(TransportUnavailable, match=f"(?s){missing}.*{command}"):
        library.load()


def test_the_environment_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "before")
    monkeypatch.delenv("MC_FORCE_HCA", raising=False)

    def inside() -> None:
        with environment.environment({"MC_FORCE_TCP": None, "MC_FORCE_HCA": "1"}):
            assert "MC_FORCE_TCP" not in os.environ
            assert os.environ["MC_FORCE_HCA"] == "1"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert os.environ["MC_FORCE_TCP"] == "before"
    assert "MC_FORCE_HCA" not in os.environ


def test_return_codes_are_explained_in_words() -> None:
    assert "registered already" in explain(-7)
    assert "code -12345" in explain(-12345)
