"""A process that is stopped is noticed within `stall`, at every step and on both sides; one that is busy is none."""

import ctypes
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Child
from seed_leases import connected, connection_to, soon, take, until

import tensorfork
from tensorfork.testing import Fault, FaultyTransport
from tensorfork.transports.process_group import Gloo
from tensorfork.transports.zeromq import ZeroMQ
from tensorfork.wire import messages
from tensorfork.wire.conversation import Conversation

pytestmark = pytest.mark.slow

STALL = 0.6
FAR = 100.0
"""The deadline, which has nothing to do with it."""
BUSY = 2.0
"""Seconds for which an interpreter is busy: longer than a stall."""
NAMES = ("a", "b", "c")
NBYTES = 16 << 20


def hold_the_interpreter(seconds: float) -> None:
    """No other thread of this process runs Python meanwhile."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def publish_over(pipe: Any, transports: Any, stall: float) -> None:
    """A seed. ("hold",) -> the interpreter is held as soon as that is answered; ("stats",) -> its statistics."""
    tensors = {name: torch.ones(NBYTES, dtype=torch.uint8) for name in NAMES}
    with tensorfork.publish(tensors, transports=transports, stall=stall) as seed:
        pipe.send(seed.address)
        while True:
            try:
                (what,) = pipe.recv()
            except EOFError:
                return
            pipe.send(seed.stats())
            if what == "hold":
                hold_the_interpreter(BUSY)


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(NBYTES, dtype=torch.uint8) for name in NAMES}


def before(kind: type, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `do` called once, before the first message of this kind is sent."""
    send, called = Conversation.request, []

    def request(self: Conversation, message: Any, *args: Any, **options: Any) -> Any:
        if type(message) is kind and not called:
            called.append(True)
            do()
        return send(self, message, *args, **options)

    monkeypatch.setattr(Conversation, "request", request)


STEPS = [(messages.GetLayout, "layout"), (messages.TakeLease, "lease"), (messages.CheckLease, "check")]
STEPS += [(messages.GetDigests, "digests")]


@pytest.mark.parametrize(("kind", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_seed_that_is_stopped_before_it_answers(kind: type, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(publish_over, ["zeromq"], 15.0) as child:
        address = child.recv()
        before(kind, child.stop, monkeypatch)
        with pytest.raises(tensorfork.PeerUnreachable, match=f"no sign of life for 0.6 s.*step {step}"):
            tensorfork.fork_into(blank(), address, transport="zeromq", timeout=FAR, stall=STALL)


def test_digests_of_a_seed_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(publish_over, ["zeromq"], 15.0) as child:
        address = child.recv()
        before(messages.GetDigests, child.stop, monkeypatch)
        with pytest.raises(tensorfork.PeerUnreachable, match=r"no sign of life for 0.6 s.*step digests"):
            tensorfork.digests(address, timeout=FAR, stall=STALL)


PULLS = [
    pytest.param(["zeromq"], lambda: FaultyTransport(ZeroMQ(), Fault(), piece=1 << 20), id="zeromq"),
    pytest.param([Gloo(rate_limit=16 << 20)], lambda: Gloo(parcel=1 << 20, bucket=1 << 20, small=1000), id="gloo"),
]


@pytest.mark.parametrize(("offered", "transport"), PULLS)
def test_a_seed_that_is_stopped_while_bytes_move(offered: Any, transport: Any) -> None:
    with Child(publish_over, offered, 15.0) as child:
        address = child.recv()
        stopped: list[float] = []

        def progress(moved: int, total: int) -> None:
            if moved and not stopped:
                child.stop()
                stopped.append(time.monotonic())

        with pytest.raises(tensorfork.TransferFailed, match=r"no sign of life for 0.6 s.*had arrived"):
            tensorfork.fork_into(blank(), address, transport=transport(), timeout=FAR, stall=STALL, progress=progress)
        assert time.monotonic() - stopped[0] < FAR / 2


@pytest.mark.parametrize(("offered", "transport"), PULLS)
def test_a_seed_that_is_stopped_while_the_transport_opens(
    offered: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Child(publish_over, offered, 15.0) as child:
        address, made = child.recv(), transport()
        opened, kind = made.open, type(made)

        def stop_first(self: Any, *args: Any) -> Any:
            child.stop()
            return opened(*args)

        monkeypatch.setattr(kind, "open", stop_first)
        with pytest.raises(tensorfork.PeerUnreachable, match=r"no sign of life for 0.6 s"):
            tensorfork.fork_into(blank(), address, transport=made, timeout=FAR, stall=STALL)


def take_a_lease(pipe: Any, address: str) -> None:
    with connected(address) as conversation:
        pipe.send(take(conversation, seconds=3600.0).lease)
        pipe.recv()


def test_a_fork_that_is_stopped_loses_its_lease() -> None:
    with (
        tensorfork.publish({"a": torch.ones(5)}, stall=STALL) as seed,
        Child(take_a_lease, seed.address) as stopped,
        Child(take_a_lease, seed.address) as running,
    ):
        stopped.recv()
        running.recv()
        stopped.stop()
        until(lambda: seed.stats().running == 1, "its lease ends")
        stats = seed.stats()
        assert (stats.granted, stats.expired, stats.running) == (2, 0, 1)


def test_a_seed_whose_interpreter_is_busy_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child(publish_over, ["zeromq"], 15.0) as child:
        address = child.recv()
        before(messages.GetLayout, lambda: child.request("hold"), monkeypatch)
        ours = blank()
        tensorfork.fork_into(ours, address, transport="zeromq", timeout=FAR, stall=STALL)
        assert all(bool(tensor.all()) for tensor in ours.values())


@pytest.mark.parametrize("kind", [messages.TakeLease, messages.CheckLease, messages.GetDigests])
def test_a_fork_whose_interpreter_is_busy_is_not_stopped(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """But while bytes move a reader that takes none for a stall is ended: it holds a share of the seed's memory."""
    with Child(publish_over, ["zeromq"], STALL) as child:
        before(kind, lambda: hold_the_interpreter(BUSY), monkeypatch)
        ours = blank()
        tensorfork.fork_into(ours, child.recv(), transport="zeromq", timeout=FAR, stall=STALL)
        assert all(bool(tensor.all()) for tensor in ours.values())


def test_answers_that_nobody_takes_for_longer_than_a_stall_end_no_connection() -> None:
    """libzmq sees no sign of life while its queue is full: a conversation's has no limit."""
    layout = {f"layer.{i}": torch.zeros(1) for i in range(2000)}
    with tensorfork.publish(layout, stall=FAR) as seed:
        conversation = connection_to(seed.address)
        short = Conversation(conversation.peer, conversation.resolved, None, STALL)
        conversation.close()
        try:
            for number in range(1000, 1100):
                short._send_frames([messages.encode(messages.GetLayout(), number)], soon(), "layout")
            end = time.monotonic() + BUSY
            while time.monotonic() < end:  # the seed's listener runs, and this thread takes nothing
                time.sleep(0.05)
            short.request(messages.Hello("test"), messages.Welcome, soon(), "hello")
        finally:
            short.close()


@pytest.mark.parametrize("value", [0, 0.05, -1, math.nan, math.inf, 86_401])
@pytest.mark.parametrize(
    "call",
    [
        lambda **more: tensorfork.fork_into(torch.nn.Linear(2, 2), "tcp://127.0.0.1:9", **more),
        lambda **more: tensorfork.fork("tcp://127.0.0.1:9", **more),
        lambda **more: tensorfork.digests("tcp://127.0.0.1:9", **more),
    ],
    ids=["fork_into", "fork", "digests"],
)
def test_a_stall_that_cannot_be_is_an_error_before_anything_happens(call: Any, value: float) -> None:
    with pytest.raises(ValueError, match=r"^stall is in seconds"):
        call(stall=value)
