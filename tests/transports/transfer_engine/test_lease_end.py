"""A seed that ends a lease over TransferEngine tells the fork to stop; the engine is a fake."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tensorfork.testing.channel import QueueChannel
from tensorfork.transports.transfer_engine.export import READS_DONE, STOP, EngineExport

SOON = 20.0


def soon() -> float:
    return time.monotonic() + SOON


class Registration:
    released = False

    def release(self) -> None:
        self.released = True


@pytest.mark.parametrize(("fabric", "revoked"), [("tcp", True), ("rdma", True), ("nvlink", False)])
def test_a_fork_that_still_reads_is_told_to_stop_and_waited_for(fabric: str, revoked: bool) -> None:
    registration: Any = Registration()
    engine: Any = SimpleNamespace(fabric=fabric)
    export = EngineExport(engine, registration, b"", stays_registered=False)
    fork = QueueChannel(lambda _: None)
    seed = QueueChannel(fork.deliver)
    fork.connect(seed.deliver)
    serving = threading.Thread(target=export.serve, args=(seed,), daemon=True)
    serving.start()
    while export._channel is None:
        assert serving.is_alive()
    closed = list[bool]()
    closing = threading.Thread(target=lambda: closed.append(export.close(soon())), daemon=True)
    closing.start()
    assert fork.recv(soon()) == STOP
    fork.send(READS_DONE, soon())
    closing.join(SOON)
    assert closed == [revoked]
    assert registration.released
    serving.join(SOON)
    assert not serving.is_alive()


def test_a_lease_that_was_never_served_is_closed_at_once() -> None:
    registration: Any = Registration()
    engine: Any = SimpleNamespace(fabric="rdma")
    assert EngineExport(engine, registration, b"", stays_registered=False).close(soon())
    assert registration.released
