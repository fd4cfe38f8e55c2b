"""One fork is followed by its trace id: through the logs of both sides, its report and its errors."""

import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Child, serve

import tensorfork

SECONDS = 20.0
GIVEN = "4bf92f3577b34da6a3ce929d0e0e4736"

Publish = Callable[[Any], tensorfork.Seed]


def model() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0)}


def test_both_sides_log_a_fork_by_the_trace_id_that_its_caller_gives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorfork")
    with Child(serve, model) as child:
        address = child.recv()
        report = tensorfork.fork_into({"weight": torch.zeros(6)}, address, timeout=SECONDS, trace=GIVEN)
        child.request("close")
        there = [line for line in child.request("log") if f"trace {GIVEN})" in line]
    assert report.trace == GIVEN
    assert [line.partition(" (lease ")[0] for line in there] == ["a fork over zeromq"] * 2, there
    assert [there[0].endswith("begins"), there[1].endswith("it was given back")] == [True, True]
    here = [line for line in caplog.messages if line.endswith(f"(trace {GIVEN})")]
    assert here == [f"a fork from {address} begins (trace {GIVEN})", f"{report} (trace {GIVEN})"]


def test_without_one_each_fork_has_an_id_of_its_own(seed_of: Publish) -> None:
    seed = seed_of(model())
    traces = [tensorfork.fork_into({"weight": torch.zeros(6)}, seed.address, timeout=SECONDS).trace for _ in range(2)]
    assert traces[0] != traces[1]
    assert all(len(bytes.fromhex(trace)) == 16 and trace == trace.lower() for trace in traces)


def test_an_error_of_a_fork_has_its_trace_id_and_both_logs_say_why(
    seed_of: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tensorfork")
    seed = seed_of(model())
    seed.drain(0)
    with pytest.raises(tensorfork.PeerRefused) as raised:
        tensorfork.fork(seed.address, timeout=SECONDS, trace=GIVEN)
    assert raised.value.trace == GIVEN
    assert any(GIVEN in note for note in raised.value.__notes__)
    assert pickle.loads(pickle.dumps(raised.value)).trace == GIVEN
    assert f"a fork over 'zeromq' is refused (trace {GIVEN}): the seed takes no more forks" in caplog.text
    assert f"a fork from {seed.address} failed (trace {GIVEN}): {raised.value}" in caplog.text


def test_a_lease_that_ends_badly_is_logged_with_its_trace_id(caplog: pytest.LogCaptureFixture) -> None:
    from tensorfork.transports.zeromq import ZeroMQ

    class Broken(ZeroMQ):
        def export(self, *args: Any) -> Any:
            raise RuntimeError("no memory")

    with (
        tensorfork.publish(model(), transports=[Broken()]) as seed,
        pytest.raises(tensorfork.TransportUnavailable),
    ):
        tensorfork.fork(seed.address, timeout=SECONDS, trace=GIVEN)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"trace {GIVEN}) is refused" in record.getMessage()


def test_a_request_for_digests_has_one_too(seed_of: Publish, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tensorfork")
    seed = seed_of(model())
    tensorfork.digests(seed.address, timeout=SECONDS)
    (begun,) = [line for line in caplog.messages if line.startswith(f"a request for digests from {seed.address}")]
    trace = begun.partition("(trace ")[2].rstrip(")")
    assert f"trace {trace}) begins" in caplog.text


def test_an_error_before_a_fork_has_begun_has_none() -> None:
    with pytest.raises(tensorfork.TransportUnavailable) as raised:
        tensorfork.fork("tcp://127.0.0.1:1", transport="carrier pigeon")
    assert raised.value.trace is None
