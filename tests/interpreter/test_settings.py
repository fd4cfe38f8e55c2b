"""One switch forbids every process-wide setting: nothing is changed, forks work, and transports say what they lack."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_seeds import needs_mooncake

import tensorfork
from tensorfork import Region, TransportUnavailable
from tensorfork.interpreter import openmp, settings
from tensorfork.interpreter.c_allocator import retain_freed_memory
from tensorfork.interpreter.environment import environment, forbidden_changes
from tensorfork.interpreter.garbage_collection import gc_paused
from tensorfork.interpreter.switch_interval import SECONDS, short_switch_interval
from tensorfork.transports.process_group import NCCL, Gloo
from tensorfork.transports.process_group.nccl import ENVIRONMENT
from tensorfork.transports.transfer_engine import TransferEngine

pytestmark = pytest.mark.slow


@pytest.fixture
def forbidden() -> Iterator[None]:
    tensorfork.allow_process_settings(False)
    yield
    tensorfork.allow_process_settings(True)


def test_settings_are_allowed_unless_somebody_forbids_them() -> None:
    assert settings.process_settings_allowed()


def test_garbage_collection_is_paused_only_where_that_is_allowed() -> None:
    with gc_paused():
        assert not gc.isenabled()
    tensorfork.allow_process_settings(False)
    try:
        with gc_paused(), gc_paused(1.0):
            assert gc.isenabled()
    finally:
        tensorfork.allow_process_settings(True)


def test_a_pause_that_began_while_it_was_allowed_ends() -> None:
    with gc_paused():
        tensorfork.allow_process_settings(False)
    tensorfork.allow_process_settings(True)
    assert gc.isenabled()


def test_the_switch_interval_stays(forbidden: None) -> None:
    usual = sys.getswitchinterval()
    with short_switch_interval:
        assert sys.getswitchinterval() == usual > SECONDS
    assert sys.getswitchinterval() == usual


def test_a_switch_interval_that_the_engine_sets_meanwhile_is_left_alone(forbidden: None) -> None:
    usual = sys.getswitchinterval()
    try:
        with short_switch_interval:
            sys.setswitchinterval(0.001)
        assert sys.getswitchinterval() == pytest.approx(0.001)
    finally:
        sys.setswitchinterval(usual)


def test_a_short_switch_interval_that_began_while_it_was_allowed_ends() -> None:
    usual = sys.getswitchinterval()
    with short_switch_interval:
        assert sys.getswitchinterval() == pytest.approx(SECONDS)
        tensorfork.allow_process_settings(False)
    tensorfork.allow_process_settings(True)
    assert sys.getswitchinterval() == usual


def test_openmp_keeps_its_threads(forbidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(openmp, "_openmp", lambda: pytest.fail("OpenMP was asked to change its threads"))
    with openmp.single_threaded() as alone:
        assert not alone


def test_the_c_allocator_is_left_as_it_is(forbidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was called"))
    retain_freed_memory(1 << 20)


def test_the_environment_stays_and_what_is_needed_is_named(forbidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORFORK_TEST_OTHER", "theirs")
    monkeypatch.delenv("TENSORFORK_TEST_UNSET", raising=False)
    before = dict(os.environ)
    with (
        pytest.raises(TransportUnavailable, match=r"TENSORFORK_TEST_OTHER=ours.*allow_process_settings"),
        environment({"TENSORFORK_TEST_OTHER": "ours"}),
    ):
        pytest.fail("the environment was changed")
    with (
        pytest.raises(TransportUnavailable, match="no TENSORFORK_TEST_OTHER"),
        environment({"TENSORFORK_TEST_OTHER": None}),
    ):
        pytest.fail("the environment was changed")
    with environment(
        {"TENSORFORK_TEST_OTHER": "theirs", "TENSORFORK_TEST_UNSET": None}, {"TENSORFORK_TEST_UNSET": "x"}
    ):
        assert dict(os.environ) == before
    assert dict(os.environ) == before


def test_what_is_preferred_is_set_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORFORK_TEST_UNSET", raising=False)
    with environment({}, {"TENSORFORK_TEST_UNSET": "x"}):
        assert os.environ["TENSORFORK_TEST_UNSET"] == "x"
    assert "TENSORFORK_TEST_UNSET" not in os.environ


def test_who_changes_nothing_waits_for_nobody() -> None:
    entered = threading.Event()

    def enter() -> None:
        with environment({}):
            entered.set()

    with environment({"TENSORFORK_TEST_OTHER": "ours"}):
        threading.Thread(target=enter, daemon=True).start()
        assert entered.wait(60)


def regions(device: str) -> list[Region]:
    return [Region(0, 1 << 20, 4096, device)]


def test_nccl_says_that_it_would_end_seeds_unless_the_deployment_sets_its_variables(
    forbidden: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with pytest.raises(TransportUnavailable, match=r"TORCH_NCCL_ASYNC_ERROR_HANDLING=0.*forbidden"):
        NCCL().facts(regions("cuda:0"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert forbidden_changes(ENVIRONMENT) is None


def test_gloo_needs_nothing_but_where_the_environment_has_it_connect_late(
    forbidden: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    assert Gloo().facts(regions("cpu")) == {"devices": ["cpu"]}
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    with pytest.raises(TransportUnavailable, match="TORCH_GLOO_LAZY_INIT=0"):
        Gloo().facts(regions("cpu"))


@needs_mooncake
@pytest.mark.parametrize("side", ["fork", "seed"])
def test_transfer_engine_says_which_variable_its_fabric_needs(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    made = TransferEngine(fabric="tcp")
    usual = made.facts(regions("cpu"))
    tensorfork.allow_process_settings(False)
    try:
        bound = made.facts(regions("cpu"))
        monkeypatch.setenv("MC_FORCE_TCP", "1")
        assert made.facts(regions("cpu")) == usual
    finally:
        tensorfork.allow_process_settings(True)
    both = (bound, usual) if side == "fork" else (usual, bound)
    reason = made.why_not(*both)
    assert reason is not None
    assert f"{side}'s side" in reason
    assert "MC_FORCE_TCP=1" in reason
    assert made.why_not(usual, usual) is None


@needs_mooncake
def test_transfer_engine_names_a_variable_that_would_abort_the_import_of_mooncake(
    forbidden: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    monkeypatch.setenv("MC_LOG_DIR", "/nowhere")
    made = TransferEngine(fabric="tcp")
    assert "forbidden" not in made.facts(regions("cpu"))
    monkeypatch.delitem(sys.modules, "mooncake.engine")
    assert "no MC_LOG_DIR" in made.facts(regions("cpu"))["forbidden"]["tcp"]


PROGRAM = """
    import gc, os, sys
    import torch, tensorfork
    from tensorfork.interpreter.settings import process_settings_allowed

    interval, variables, seen = sys.getswitchinterval(), dict(os.environ), []

    def progress(arrived: int, of: int) -> None:
        seen.append((gc.isenabled(), sys.getswitchinterval() == interval, dict(os.environ) == variables))

    model = {f"w{i}": torch.randn(100, 100) for i in range(50)}
    with tensorfork.publish(model, transports=["zeromq", "gloo"]) as seed:
        for transport in ("zeromq", "gloo"):
            copied = {name: torch.zeros(100, 100) for name in model}
            report = tensorfork.fork_into(copied, seed.address, transport=transport, progress=progress)
            assert report.verified and all(torch.equal(copied[name], model[name]) for name in model)
    print(process_settings_allowed(), len(seen) >= 4, set(seen))
"""


@pytest.mark.parametrize(
    ("value", "said"), [("0", "False True {(True, True, True)}"), ("1", "True True {(False, True, True)}")]
)
def test_a_whole_fork_changes_nothing_where_the_environment_forbids_it(value: str, said: str) -> None:
    run: Any = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "TENSORFORK_PROCESS_SETTINGS": value},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == said
